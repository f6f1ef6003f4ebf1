"""The interface of virtio devices, whatever bus they sit on (virtio 1.2 §2).

To add a device: derive one class from :class:`VirtioDevice`, in a file of its own. It gets its
queues as it starts, works on the chains that it takes from them, and never sees the transport.
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
    """Virtqueue, as :meth:`VirtioDevice.run` gets it."""

    async def wait(self) -> None:
        """Wait until the driver may have made chains available.

        The first call after a start returns at once. After a return, call :meth:`pop` until it
        gives ``None``. A cancellation loses no notification.
        """

    def pop(self) -> Chain | None:
        """Take the next chain, if there is one.

        :raises QueueFault, GuestMemoryError: the driver broke the rules. Let the error out of
            :meth:`VirtioDevice.run`.
        """

    def push(self, chain: Chain, written: int = 0) -> None:
        """Give a chain back. ``written`` bytes from the start of its writable part are new."""

    def interrupt(self) -> None:
        """Tell the driver about the chains pushed, if it wants to know. Call it once per batch."""


class VirtioDevice(ABC):
    """A virtio device without its bus.

    :cvar device_id: the device's number (§5).
    :ivar queue_sizes: the largest size of each of its queues; powers of 2.
    :ivar features: the features that the device itself offers, as a mask.
    :ivar driver_features: the features that were negotiated, those of the transport too; set
        before :meth:`run` begins.
    """

    device_id: ClassVar[int]
    queue_sizes: tuple[int, ...]
    features: int = 0
    driver_features: int = 0

    def read_config(self, offset: int, length: int) -> bytes:
        """Read ``length`` (1, 2, 4 or 8) bytes of the configuration space, zeros beyond its end.

        Called from vCPU threads with the machine's lock held; so is :meth:`write_config`.
        """
        return bytes(length)

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027 - optional
        """Write ``data`` to the configuration space at ``offset``, which may be any."""

    @abstractmethod
    async def run(self, queues: Sequence[Queue]) -> None:
        """Serve the queues until cancelled. Called when the driver says DRIVER_OK.

        A reset cancels it, and so does a pause, after which it is called again. When it has ended,
        every chain that was popped must have been pushed, and nothing may touch guest memory.

        :param queues: one for each of ``queue_sizes``. A queue that the driver has not enabled
            never has a chain.
        :raises QueueFault, GuestMemoryError: the driver is at fault, and the device stands still
            until the driver resets it. An exception group of these is as good, so a nursery with a
            task for each queue will do.
        """

    def reset(self) -> None:  # noqa: B027 - optional
        """Forget all that the driver did. :meth:`run` has ended or has not begun.

        Called with the machine's lock held, in the Trio thread or a vCPU's.
        """

    def save(self) -> bytes:
        """Give the device's own state, for :meth:`load`. :meth:`run` has ended."""
        return b""

    def load(self, state: bytes) -> None:  # noqa: B027 - optional
        """Take over the state that :meth:`save` gave. Called before the first :meth:`run`.

        :raises ValueError: it is no such state.
        """
