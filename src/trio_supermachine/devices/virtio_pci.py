"""The virtio transport over PCI, modern devices only (virtio 1.2 §4.1), without I/O.

Theory of operation. A :class:`VirtioPciFunction` stands between a driver, which reads and writes
its registers in a vCPU's thread, and a device, whose :meth:`~.virtio.VirtioDevice.run` is a task in
the Trio thread. It never waits: what has to be done goes to the engine through
:class:`TransportEvents`. The life of a device::

    reset --driver sets up queues, DRIVER_OK--> running --driver breaks a rule--> NEEDS_RESET
      ^                                            |                                 |
      +--- finish_reset, once `run` has ended ---- resetting <---driver writes 0-----+

- *running*: the virtqueues exist. They belong to ``run``, which uses them without the lock. A pause
  ends ``run``, and a resume begins it anew, on the same virtqueues.
- *NEEDS_RESET*: ``run`` has ended by a fault (§2.1.2), or the queues could not be made. Only a
  reset helps.
- *resetting*: registers are locked and the status reads as it was (§4.1.4.3.1) until ``run`` has
  ended: a driver that waits for 0 knows that the device touches its memory no more.

*Registers* lie in one memory BAR, in parts of a page each: common configuration and ISR status,
device configuration, doorbells (notify registers), MSI-X table, pending bits. The kernel usually
takes doorbells and interrupts without an exit: the engine ties them to descriptors when
:meth:`TransportEvents.doorbells_moved` and :meth:`TransportEvents.vectors_changed` say so. A driver
without MSI-X finds causes in the ISR status, but there is no interrupt line.

*Locks.* Every method wants the machine's lock held; the data path comes here only to send an
interrupt.

*A hostile driver* may read and write anything at any offset and size. No write has an effect beyond
this function's state and the calls to the engine.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final, Protocol, final

import attrs

from .memory import GuestMemory, GuestMemoryError
from .msix import CONTROL_WRITABLE, Msix, MsixMessage
from .pci import CAP_MSIX, CAP_VENDOR, PciFunction
from .virtio import (
    ID_BLOCK,
    ID_CONSOLE,
    ID_NET,
    ID_VSOCK,
    STATUS_DEVICE_NEEDS_RESET,
    TRANSPORT_FEATURES,
    VirtioDevice,
)
from .virtio_common import COMMON_SIZE, NO_VECTOR, CommonConfig, Demand, bounded
from .virtqueue import MAX_QUEUE_SIZE, QueueFault, QueueState, Virtqueue

VENDOR_ID: Final = 0x1AF4
FIRST_DEVICE_ID: Final = 0x1040
#: Bytes between the notify registers of two queues.
NOTIFY_MULTIPLIER: Final = 4

# The BAR and its parts, which a driver finds through capabilities.
BAR_SIZE: Final = 0x8000
PART_COMMON: Final = 0x0000
PART_DEVICE: Final = 0x1000
PART_NOTIFY: Final = 0x2000
PART_MSIX_TABLE: Final = 0x3000
PART_MSIX_PENDING: Final = 0x4000
_PART_SIZE: Final = 0x1000
#: Offset of the ISR status, in the first part.
ISR: Final = 0x0800
#: Queues that a device may have: their vectors and that of the configuration fit in one part.
MAX_QUEUES: Final = _PART_SIZE // 16 - 1

ISR_QUEUE: Final = 1
ISR_CONFIG: Final = 2

# Types of the vendor's capabilities (§4.1.4).
CAP_COMMON_CFG: Final = 1
CAP_NOTIFY_CFG: Final = 2
CAP_ISR_CFG: Final = 3
CAP_DEVICE_CFG: Final = 4
CAP_PCI_CFG: Final = 5

# PCI class codes of some device ids; a class is a hint that no driver of virtio takes.
_CLASSES: Final = {ID_NET: 0x020000, ID_BLOCK: 0x018000, ID_CONSOLE: 0x078000, ID_VSOCK: 0x078000}
_OTHER_CLASS: Final = 0xFF0000


class TransportEvents(Protocol):
    """Calls that a function makes to its engine, with the machine's lock held.

    Most come from a vCPU's thread: an implementation passes on what the Trio thread has to do.
    """

    def driver_ok(self) -> None:
        """Start the device's ``run`` on the function's ``virtqueues``.

        Whenever ``run`` starts, ask :meth:`.Virtqueue.should_interrupt` first: the last run may
        have ended between a push and its interrupt.
        """

    def reset_requested(self) -> None:
        """End ``run``, then call :meth:`VirtioPciFunction.finish_reset`."""

    def kick(self, queue: int) -> None:
        """Wake whoever waits for ``queue``: the driver has notified by a register write."""

    def signal(self, vector: int) -> None:
        """Send the interrupt of ``vector``, which is not masked."""

    def vectors_changed(self, vector: int) -> None:
        """Look at :meth:`VirtioPciFunction.message` of ``vector`` again: it has changed."""

    def doorbells_moved(self, address: int | None) -> None:
        """Take notifications at a new place.

        :param address: the guest-physical address of queue 0's notify register; queue i's is
            4 * i behind it. Drivers write 2 bytes. ``None`` stands for nowhere, and comes before
            each new address.
        """


@final
class VirtioPciFunction(PciFunction):
    """A virtio device as a PCI function, with an MSI-X vector for each queue and one more.

    Every method wants the machine's lock held.

    :ivar device: the device itself.
    :ivar virtqueues: one for each queue of the device from DRIVER_OK to the end of the reset;
        ``None`` for one that the driver has not enabled.
    :raises ValueError: the device has too many queues, or one of a size that is not allowed.
    """

    def __init__(self, device: VirtioDevice, memory: GuestMemory, events: TransportEvents) -> None:
        if not 0 < len(device.queue_sizes) <= MAX_QUEUES:
            raise ValueError(f"a virtio device has 1 to {MAX_QUEUES} queues here")
        for size in device.queue_sizes:
            if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
                raise ValueError("the size of a virtqueue is a power of 2, at most 32768")
        super().__init__(
            vendor_id=VENDOR_ID,
            device_id=FIRST_DEVICE_ID + device.device_id,
            class_code=_CLASSES.get(device.device_id, _OTHER_CLASS),
            revision=1,
            subsystem_vendor_id=VENDOR_ID,
            subsystem_id=FIRST_DEVICE_ID + device.device_id,
            bar_size=BAR_SIZE,
        )
        self.device = device
        self.virtqueues: tuple[Virtqueue | None, ...] = ()
        self.msix: Msix = Msix(len(device.queue_sizes) + 1)
        self._memory = memory
        self._events = events
        self._common = CommonConfig(
            device.features | TRANSPORT_FEATURES, device.queue_sizes, self.msix.vectors
        )
        self._isr = 0
        self._add_capabilities()

    def _add_capabilities(self) -> None:
        def body(kind: int, offset: int, length: int, more: bytes = b"") -> bytes:
            return struct.pack("<BBB3xII", 16 + len(more), kind, 0, offset, length) + more

        add = self._add_capability
        self._control_at = 2 + add(
            CAP_MSIX,
            struct.pack("<HII", self.msix.control, PART_MSIX_TABLE, PART_MSIX_PENDING),
            CONTROL_WRITABLE.to_bytes(2, "little"),
        )
        multiplier = NOTIFY_MULTIPLIER.to_bytes(4, "little")
        doorbells = NOTIFY_MULTIPLIER * len(self.device.queue_sizes)
        add(CAP_VENDOR, body(CAP_COMMON_CFG, PART_COMMON, COMMON_SIZE))
        add(CAP_VENDOR, body(CAP_NOTIFY_CFG, PART_NOTIFY, doorbells, multiplier))
        add(CAP_VENDOR, body(CAP_ISR_CFG, ISR, 1))
        add(CAP_VENDOR, body(CAP_DEVICE_CFG, PART_DEVICE, _PART_SIZE))
        # A window to the BAR (§4.1.4.9): which BAR, offset, length and data can be written.
        writable = b"\0\0\xff\0\0\0" + b"\xff" * 12
        self._window_at = add(CAP_VENDOR, body(CAP_PCI_CFG, 0, 0, bytes(4)), writable)

    # --- for the engine ---

    @property
    def status(self) -> int:
        """Device status (§2.1)."""
        return self._common.status

    @property
    def running(self) -> bool:
        """Whether ``run`` is to go on: DRIVER_OK, and neither a reset nor a fault since."""
        return (
            bool(self.virtqueues)
            and not self._common.locked
            and not self._common.status & STATUS_DEVICE_NEEDS_RESET
        )

    def message(self, vector: int) -> MsixMessage | None:
        """Give the message that ``vector`` sends; ``None`` while it is masked.

        The last vector, whose number is that of the queues, is for the configuration.
        """
        return self.msix.message(vector)

    def interrupt_queue(self, queue: int) -> None:
        """Send the interrupt of ``queue``; if its vector is masked, that becomes pending."""
        if not self.msix.enabled:
            self._isr |= ISR_QUEUE
        self._trigger(self._common.queues[queue].vector)

    def config_changed(self) -> None:
        """Tell the driver that the device's configuration space has changed."""
        self._common.generation = (self._common.generation + 1) & 0xFF
        self._interrupt_config()

    def fail(self) -> None:
        """Ask the driver for a reset (§2.1.2), as ``run`` has ended by a fault of the driver's."""
        if self.running:
            self._common.status |= STATUS_DEVICE_NEEDS_RESET
            self._interrupt_config()

    def finish_reset(self) -> None:
        """Finish a reset, once ``run`` has ended. Without effect if none was asked for."""
        if self._common.locked:
            self._reset()

    def _interrupt_config(self) -> None:
        self._isr |= ISR_CONFIG
        self._trigger(self._common.config_vector)

    def _trigger(self, vector: int) -> None:
        if vector != NO_VECTOR and self.msix.trigger(vector):
            self._events.signal(vector)

    def _reset(self) -> None:
        self._common.reset()
        self._isr = 0
        self.virtqueues = ()
        self.msix.clear_pending()
        self.device.driver_features = 0
        self.device.reset()

    def _start(self) -> None:
        try:
            virtqueues = self._common.virtqueues(self._memory)
        except (QueueFault, GuestMemoryError):
            self._common.status |= STATUS_DEVICE_NEEDS_RESET
            self._interrupt_config()
            return
        self.virtqueues = virtqueues
        self.device.driver_features = self._common.driver_features
        self._events.driver_ok()

    # --- for the guest ---

    def read_config(self, register: int, size: int) -> int:
        data = self._window_at + 16
        if register < data + 4 and register + size > data and (place := self._window()):
            value = self.read_bar(*place)
            self._config[data : data + place[1]] = value.to_bytes(place[1], "little")
        return super().read_config(register, size)

    def write_config(self, register: int, size: int, value: int) -> bool:
        moved = super().write_config(register, size, value)
        end = register + size
        if register < self._control_at + 2 and end > self._control_at:
            self._vectors_changed(self.msix.set_control(self._get(self._control_at, 2)))
        data = self._window_at + 16
        if register < data + 4 and end > data and (place := self._window()):
            self.write_bar(*place, self._get(data, place[1]))
        return moved

    def _window(self) -> tuple[int, int] | None:
        """Give offset in the BAR and size of the access that the capability points to."""
        bar = self._config[self._window_at + 4]
        offset, length = self._get(self._window_at + 8, 4), self._get(self._window_at + 12, 4)
        if bar or length not in (1, 2, 4) or offset % length or offset + length > BAR_SIZE:
            return None
        return offset, length

    def bar_moved(self, address: int | None) -> None:
        self._events.doorbells_moved(None if address is None else address + PART_NOTIFY)

    def read_bar(self, offset: int, size: int) -> int:
        part = offset & -_PART_SIZE
        if part == PART_DEVICE:
            data = self.device.read_config(offset - PART_DEVICE, size)
            return int.from_bytes(data[:size], "little")
        if part == PART_MSIX_TABLE:
            return self.msix.read_table(offset - PART_MSIX_TABLE, size)
        if part == PART_MSIX_PENDING:
            return self.msix.read_pending(offset - PART_MSIX_PENDING, size)
        if offset == ISR:
            isr, self._isr = self._isr, 0
            return isr
        return self._common.read(offset, size) if offset < COMMON_SIZE else 0

    def write_bar(self, offset: int, size: int, value: int) -> None:
        part = offset & -_PART_SIZE
        if part == PART_NOTIFY:
            queue = (offset - PART_NOTIFY) // NOTIFY_MULTIPLIER
            if self.running and queue < len(self.virtqueues):
                self._events.kick(queue)
        elif part == PART_DEVICE:
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            self.device.write_config(offset - PART_DEVICE, data)
        elif part == PART_MSIX_TABLE:
            self._vectors_changed(self.msix.write_table(offset - PART_MSIX_TABLE, size, value))
        elif offset < COMMON_SIZE:
            demand = self._common.write(offset, size, value)
            if demand is Demand.START:
                self._start()
            elif demand is Demand.RESET and not self.virtqueues:
                self._reset()
            elif demand is Demand.RESET:
                # The status reads as it was until the device has stopped (§4.1.4.3.1).
                self._common.locked = True
                self._events.reset_requested()

    def _vectors_changed(self, vectors: list[int]) -> None:
        for vector in vectors:
            self._events.vectors_changed(vector)
            if self.msix.message(vector) is not None and self.msix.take_pending(vector):
                self._events.signal(vector)

    # --- for snapshots ---

    def save(self) -> dict[str, Any]:
        """Give the function's state with the device's own, as JSON has it; ``run`` has ended."""
        self.finish_reset()  # the driver may wait for it
        return {
            **super().save(),
            "device_id": self.device.device_id,
            "device": self.device.save().hex(),
            "common": self._common.save(),
            "isr": self._isr,
            "msix": self.msix.save(),
            "virtqueues": [
                virtqueue and attrs.asdict(virtqueue.save()) for virtqueue in self.virtqueues
            ],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        if state["device_id"] != self.device.device_id:
            raise ValueError("the state of another virtio device")
        super().load(state)
        self.msix.load(state["msix"])
        if self.msix.control != self._get(self._control_at, 2):
            raise ValueError("MSI-X and its capability differ")
        self._isr = bounded(state["isr"], 8)
        self._common.load(state["common"])
        states = [
            None
            if saved is None
            else QueueState(bounded(saved["next_available"], 16), bounded(saved["next_used"], 16))
            for saved in state["virtqueues"]
        ]
        if states:
            if [s is not None for s in states] != [q.enabled for q in self._common.queues]:
                raise ValueError("the state of other virtqueues")
            try:
                self.virtqueues = self._common.virtqueues(self._memory, states)
            except (QueueFault, GuestMemoryError) as error:
                raise ValueError(f"the state of virtqueues that cannot be: {error}") from error
            self.device.driver_features = self._common.driver_features
        self.device.load(bytes.fromhex(state["device"]))

    def loaded(self) -> None:
        for vector in range(self.msix.vectors):
            if self.msix.message(vector) is not None:
                self._events.vectors_changed(vector)
        if self.running:
            self._events.driver_ok()
