"""What a virtio device is, whatever bus it sits on (virtio 1.2 §2).

A device is one class below :class:`VirtioDevice`; its queues are given to it as it starts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final, Protocol

from .virtqueue import Chain

# Device status (§2.1).
STATUS_ACKNOWLEDGE: Final = 1
STATUS_DRIVER: Final = 2
STATUS_DRIVER_OK: Final = 4
STATUS_FEATURES_OK: Final = 8
STATUS_DEVICE_NEEDS_RESET: Final = 64
STATUS_FAILED: Final = 128

# Features that belong to the queues and the transport (§6), as masks.
F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
TRANSPORT_FEATURES: Final = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC

# Device ids (§5).
ID_NET: Final = 1
ID_BLOCK: Final = 2
ID_CONSOLE: Final = 3
ID_ENTROPY: Final = 4
ID_BALLOON: Final = 5
ID_VSOCK: Final = 19
ID_FS: Final = 26


class Queue(Protocol):
    """A virtqueue as :meth:`VirtioDevice.run` gets it."""

    async def wait(self) -> None:
        """Wait until the driver may have made chains available.

        The first call after a start returns at once. After a return :meth:`pop` until it gives
        None. A cancellation loses no notification.
        """

    def pop(self) -> Chain | None:
        """Take the next chain, if there is one.

        :raises QueueFault: the driver broke the rules; let it out of :meth:`VirtioDevice.run`.
        :raises GuestMemoryError: likewise.
        """

    def push(self, chain: Chain, written: int = 0) -> None:
        """Give a chain back after ``written`` bytes from the start of its writable part."""

    def interrupt(self) -> None:
        """Tell the driver about what was pushed, if it wants to know. Once per batch."""


class VirtioDevice(ABC):
    """A virtio device without its bus.

    :cvar device_id: its number (§5).
    :ivar queue_sizes: the largest size of each of its queues; powers of 2.
    :ivar features: the features of its own that it offers, as a mask.
    :ivar driver_features: what was negotiated of all that was offered; set by the transport
        before :meth:`run` begins.
    """

    device_id: ClassVar[int]
    queue_sizes: tuple[int, ...]
    features: int = 0
    driver_features: int = 0

    def read_config(self, offset: int, length: int) -> bytes:
        """``length`` (1, 2, 4 or 8) bytes of the configuration space, zeros beyond its end.

        Called from vCPU threads with the machine's lock held, as is `write_config`.
        """
        return bytes(length)

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027 - optional
        """The driver wrote ``data`` to the configuration space at ``offset``; any offset."""

    @abstractmethod
    async def run(self, queues: Sequence[Queue]) -> None:
        """Serve the queues until cancelled; begins when the driver says DRIVER_OK.

        Cancelled for a reset and also for a pause, after which it is called again. When it has
        ended, every chain that was popped has been pushed and nothing touches guest memory.

        :param queues: one for each of ``queue_sizes``. One that the driver has not enabled
            never has a chain.
        :raises QueueFault, GuestMemoryError: the driver is at fault, and the device stands still
            until the driver resets it. Groups of these are as good, so a nursery with a task for
            each queue will do.
        """

    def reset(self) -> None:  # noqa: B027 - optional
        """Forget what the driver did; :meth:`run` has ended or has not begun.

        Called with the machine's lock held, from the Trio thread or a vCPU's.
        """

    def save(self) -> bytes:
        """The device's own state, for :meth:`load`; :meth:`run` has ended."""
        return b""

    def load(self, state: bytes) -> None:  # noqa: B027 - optional
        """Go on from what :meth:`save` gave; called before the first :meth:`run`.

        :raises ValueError: it is no such state.
        """
