"""The common configuration of a virtio device on PCI (virtio 1.2 §4.1.4.3), without I/O.

Through these registers a driver negotiates features, sets up queues and starts the device. A write
that asks the transport to act gives a :class:`Demand`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final, final

import attrs

from .memory import GuestMemory
from .virtio import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    STATUS_ACKNOWLEDGE,
    STATUS_DEVICE_NEEDS_RESET,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
)
from .virtqueue import QueueState, Virtqueue

#: "No vector" in the registers that name one.
NO_VECTOR: Final = 0xFFFF

DEVICE_FEATURE_SELECT: Final = 0x00
DEVICE_FEATURE: Final = 0x04
DRIVER_FEATURE_SELECT: Final = 0x08
DRIVER_FEATURE: Final = 0x0C
CONFIG_MSIX_VECTOR: Final = 0x10
NUM_QUEUES: Final = 0x12
DEVICE_STATUS: Final = 0x14
CONFIG_GENERATION: Final = 0x15
QUEUE_SELECT: Final = 0x16
QUEUE_SIZE: Final = 0x18
QUEUE_MSIX_VECTOR: Final = 0x1A
QUEUE_ENABLE: Final = 0x1C
QUEUE_NOTIFY_OFF: Final = 0x1E
QUEUE_DESC: Final = 0x20
QUEUE_DRIVER: Final = 0x28
QUEUE_DEVICE: Final = 0x30

_LAYOUT: Final = struct.Struct("<IIIIHHBBHHHHHQQQ")
#: Bytes of the structure.
COMMON_SIZE: Final = _LAYOUT.size

# The registers that can be written, and their bytes; the addresses are pairs of 32 bits.
_WRITABLE: Final[Mapping[int, int]] = {
    DEVICE_FEATURE_SELECT: 4,
    DRIVER_FEATURE_SELECT: 4,
    DRIVER_FEATURE: 4,
    CONFIG_MSIX_VECTOR: 2,
    DEVICE_STATUS: 1,
    QUEUE_SELECT: 2,
    QUEUE_SIZE: 2,
    QUEUE_MSIX_VECTOR: 2,
    QUEUE_ENABLE: 2,
    **dict.fromkeys(range(QUEUE_DESC, COMMON_SIZE, 4), 4),
}
_ADDRESSES: Final = (QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE)
_DRIVER_STATUS: Final = (
    STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK | STATUS_FEATURES_OK | STATUS_FAILED
)
_LOW: Final = 0xFFFF_FFFF


class Demand(Enum):
    """Act that a write asks of the transport."""

    RESET = "reset"
    START = "start"


@final
@attrs.define(eq=False)
class QueueConfig:
    """Settings of one queue by its driver; ``addresses``: descriptors, available, used."""

    max_size: int
    size: int
    vector: int = NO_VECTOR
    enabled: bool = False
    addresses: list[int] = attrs.Factory(lambda: [0, 0, 0])


@final
class CommonConfig:
    """The registers.

    :param offered: the features that are offered, as a mask.
    :param queue_sizes: the largest size of each queue.
    :param vectors: the number of MSI-X vectors.
    :ivar locked: ignore writes, as during a reset.
    """

    def __init__(self, offered: int, queue_sizes: Sequence[int], vectors: int) -> None:
        self.locked: bool = False
        self.status: int = 0
        self.generation: int = 0
        self.config_vector: int = NO_VECTOR
        self.driver_features: int = 0
        self.queues: list[QueueConfig] = [QueueConfig(size, size) for size in queue_sizes]
        self._offered = offered
        self._vectors = vectors
        self._device_feature_select = 0
        self._driver_feature_select = 0
        self._queue_select = 0

    def reset(self) -> None:
        """Restore the values of power-on, but for the generation, which only ever counts up."""
        self.locked = False
        self.status = 0
        self.config_vector = NO_VECTOR
        self.driver_features = 0
        self.queues = [QueueConfig(queue.max_size, queue.max_size) for queue in self.queues]
        self._device_feature_select = self._driver_feature_select = self._queue_select = 0

    def virtqueues(
        self, memory: GuestMemory, states: Sequence[QueueState | None] | None = None
    ) -> tuple[Virtqueue | None, ...]:
        """Make the queues as the driver has set them up; ``None`` for those not enabled.

        :param states: the states to go on from.
        :raises QueueFault, GuestMemoryError: a size or an address is not allowed.
        """
        return tuple(
            Virtqueue(
                memory,
                size=queue.size,
                descriptors=queue.addresses[0],
                available=queue.addresses[1],
                used=queue.addresses[2],
                event_index=bool(self.driver_features & F_EVENT_IDX),
                indirect=bool(self.driver_features & F_INDIRECT_DESC),
                state=states[index] if states else None,
            )
            if queue.enabled
            else None
            for index, queue in enumerate(self.queues)
        )

    def read(self, offset: int, size: int) -> int:
        """Read ``size`` bytes at ``offset``, of whatever registers; zeros beyond the end."""
        select = self._queue_select
        known = select < len(self.queues)
        queue = self.queues[select] if known else QueueConfig(0, 0)
        data = _LAYOUT.pack(
            self._device_feature_select,
            _word(self._offered, self._device_feature_select),
            self._driver_feature_select,
            _word(self.driver_features, self._driver_feature_select),
            self.config_vector,
            len(self.queues),
            self.status,
            self.generation,
            select,
            queue.size,
            queue.vector,
            queue.enabled,
            select if known else 0,
            *queue.addresses,
        )
        return int.from_bytes(data[offset : offset + size], "little")

    def write(self, register: int, size: int, value: int) -> Demand | None:
        """Write ``size`` bytes; an access that is not to one register has no effect (§4.1.3.1)."""
        if size == 8 and register in _ADDRESSES:
            self.write(register, 4, value)
            register, size, value = register + 4, 4, value >> 32
        if self.locked or _WRITABLE.get(register) != size:
            return None
        value &= (1 << 8 * size) - 1
        if register == DEVICE_STATUS:
            return self._write_status(value)
        if register == DEVICE_FEATURE_SELECT:
            self._device_feature_select = value
        elif register == DRIVER_FEATURE_SELECT:
            self._driver_feature_select = value
        elif register == DRIVER_FEATURE:
            self._write_features(value)
        elif register == CONFIG_MSIX_VECTOR:
            self.config_vector = self._vector(value)
        elif register == QUEUE_SELECT:
            self._queue_select = value
        elif self._queue_select < len(self.queues):
            self._write_queue(self.queues[self._queue_select], register, value)
        return None

    def _vector(self, value: int) -> int:
        # A driver finds out from NO_VECTOR that there is no such vector (§4.1.5.1.2).
        return value if value < self._vectors else NO_VECTOR

    def _write_features(self, value: int) -> None:
        select = self._driver_feature_select
        if self.status & STATUS_FEATURES_OK or select > 1:
            return
        other = self.driver_features & _LOW << 32 * (1 - select)
        self.driver_features = other | value << 32 * select

    def _write_queue(self, queue: QueueConfig, register: int, value: int) -> None:
        if register == QUEUE_MSIX_VECTOR:
            queue.vector = self._vector(value)
        elif queue.enabled or self.status & STATUS_DRIVER_OK:
            pass  # an enabled queue keeps its settings (§4.1.4.3.2)
        elif register == QUEUE_SIZE:
            if 0 < value <= queue.max_size and not value & (value - 1):
                queue.size = value
        elif register == QUEUE_ENABLE:
            queue.enabled = value == 1
        else:
            which, half = divmod(register - QUEUE_DESC, 8)
            other = queue.addresses[which] & (_LOW if half else _LOW << 32)
            queue.addresses[which] = other | value << 8 * half

    def _write_status(self, value: int) -> Demand | None:
        if not value:
            return Demand.RESET
        # Bits are only ever added (§2.1.1).
        new = value & _DRIVER_STATUS & ~self.status
        if new & STATUS_FEATURES_OK and not self._acceptable():
            new &= ~STATUS_FEATURES_OK
        starts = new & STATUS_DRIVER_OK and (self.status | new) & STATUS_FEATURES_OK
        self.status |= new if starts else new & ~STATUS_DRIVER_OK
        return Demand.START if starts else None

    def _acceptable(self) -> bool:
        features = self.driver_features
        return not features & ~self._offered and bool(features & F_VERSION_1)

    def save(self) -> dict[str, Any]:
        """Give the state, as JSON has it."""
        return {
            "status": self.status,
            "generation": self.generation,
            "config_vector": self.config_vector,
            "driver_features": self.driver_features,
            "device_feature_select": self._device_feature_select,
            "driver_feature_select": self._driver_feature_select,
            "queue_select": self._queue_select,
            "queues": [attrs.asdict(queue) for queue in self.queues],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over the state that :meth:`save` gave.

        :raises ValueError, KeyError, TypeError: it is no such state, or of other queues.
        """
        status = bounded(state["status"], 8)
        if status & ~(_DRIVER_STATUS | STATUS_DEVICE_NEEDS_RESET):
            raise ValueError("no status of a virtio device")
        features = bounded(state["driver_features"], 64)
        if status & STATUS_FEATURES_OK and features & ~self._offered:
            raise ValueError("features of another virtio device")
        self.status, self.driver_features = status, features
        self.generation = bounded(state["generation"], 8)
        self.config_vector = self._vector(bounded(state["config_vector"], 16))
        self._device_feature_select = bounded(state["device_feature_select"], 32)
        self._driver_feature_select = bounded(state["driver_feature_select"], 32)
        self._queue_select = bounded(state["queue_select"], 16)
        for queue, saved in zip(self.queues, state["queues"], strict=True):
            size = bounded(saved["size"], 16)
            if saved["max_size"] != queue.max_size or size > queue.max_size:
                raise ValueError("the queues of another virtio device")
            queue.size = size
            queue.vector = self._vector(bounded(saved["vector"], 16))
            queue.enabled = bool(saved["enabled"])
            descriptors, available, used = saved["addresses"]
            queue.addresses = [bounded(descriptors, 64), bounded(available, 64), bounded(used, 64)]


def bounded(value: Any, bits: int) -> int:
    """Check that ``value`` is an unsigned integer of so many bits, and give it.

    :raises ValueError: it is not.
    """
    if not isinstance(value, int) or value >> bits:
        raise ValueError(f"{value!r} in the place of {bits} bits")
    return value


def _word(value: int, select: int) -> int:
    return value >> 32 * select & _LOW if select < 2 else 0
