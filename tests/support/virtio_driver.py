"""The driver's side of virtio, right or hostile, and the shell that an engine puts round a device.

:class:`Ring` is the driver's half of a split virtqueue; :class:`PciDriver` finds a function
through configuration space and sets it up as Linux does; :class:`Shell` runs its device.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import ClassVar

import attrs
import trio

from trio_supermachine.devices import virtio_common as common
from trio_supermachine.devices import virtio_pci as transport
from trio_supermachine.devices.memory import GuestMemory, GuestMemoryError
from trio_supermachine.devices.pci import CAP_MSIX, CAP_VENDOR, ECAM_FUNCTION_SIZE, PciBus
from trio_supermachine.devices.virtio import (
    STATUS_ACKNOWLEDGE,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FEATURES_OK,
    Queue,
    VirtioDevice,
)
from trio_supermachine.devices.virtqueue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    Chain,
    QueueFault,
    QueueState,
    Virtqueue,
)

NEXT, WRITE, INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT

#: Guest-physical start and bytes of the window for BARs.
WINDOW, WINDOW_SIZE = 0x40_0000_0000, 0x100_0000


class Ring:
    """The driver's side of a split virtqueue that begins at ``base``, a multiple of 16."""

    def __init__(self, memory: GuestMemory, base: int, size: int, *, event_index: bool) -> None:
        self.memory = memory
        self.size = size
        self.event_index = event_index
        self.descriptors = base
        self.available = base + 16 * size
        self.used_ring = self.available + (6 + 2 * size + 3) // 4 * 4
        self.end = (self.used_ring + 6 + 8 * size + 15) // 16 * 16
        self.next_available = 0
        self.next_used = 0
        self.free = list(range(size))
        self._chains: dict[int, list[int]] = {}
        self._kicked = 0
        memory.write(base, bytes(self.end - base))

    def device(self, state: QueueState | None = None, *, indirect: bool = True) -> Virtqueue:
        """The device's side."""
        return Virtqueue(
            self.memory,
            size=self.size,
            descriptors=self.descriptors,
            available=self.available,
            used=self.used_ring,
            event_index=self.event_index,
            indirect=indirect,
            state=state,
        )

    # --- single fields, right or wrong ---

    def u16(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 2), "little")

    def set_u16(self, address: int, value: int) -> None:
        self.memory.write(address, (value & 0xFFFF).to_bytes(2, "little"))

    def set_descriptor(
        self, at: int, address: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        """Descriptor ``at`` of the table."""
        self.memory.write(
            self.descriptors + 16 * at, pack_descriptor(address, length, flags, following)
        )

    def publish(self, head: int) -> None:
        """Make ``head`` available, whatever it is."""
        self.set_u16(self.available + 4 + 2 * (self.next_available % self.size), head)
        self.next_available = (self.next_available + 1) & 0xFFFF
        self.set_u16(self.available + 2, self.next_available)

    def forbid_interrupts(self, forbidden: bool = True) -> None:
        self.set_u16(self.available, int(forbidden))

    def set_used_event(self, index: int) -> None:
        self.set_u16(self.available + 4 + 2 * self.size, index)

    # --- as a driver does it ---

    def add(
        self,
        parts: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]] = (),
        *,
        table: int | None = None,
    ) -> int:
        """Make a chain of (address, length) available; gives its head.

        ``table``: where to put an indirect table.
        """
        entries = [(*part, 0) for part in parts] + [(*part, WRITE) for part in writable]
        if table is not None:
            for at, (address, length, flags) in enumerate(entries):
                flags |= NEXT if at + 1 < len(entries) else 0
                self.memory.write(table + 16 * at, pack_descriptor(address, length, flags, at + 1))
            entries = [(table, 16 * len(entries), INDIRECT)]
        taken = [self.free.pop() for _ in entries]
        for at, (address, length, flags) in enumerate(entries):
            more = at + 1 < len(entries)
            following = taken[at + 1] if more else 0
            self.set_descriptor(
                taken[at], address, length, flags | (NEXT if more else 0), following
            )
        self._chains[taken[0]] = taken
        self.publish(taken[0])
        return taken[0]

    def used(self) -> list[tuple[int, int]]:
        """(head, bytes written) of what has come back; asks for an interrupt at the next one."""
        found = []
        index = self.u16(self.used_ring + 2)
        while self.next_used != index:
            at = self.used_ring + 4 + 8 * (self.next_used % self.size)
            head, written = struct.unpack("<II", self.memory.read(at, 8))
            found.append((head, written))
            self.free.extend(self._chains.pop(head, ()))
            self.next_used = (self.next_used + 1) & 0xFFFF
        if self.event_index:
            self.set_used_event(self.next_used)
        return found

    def wants_kick(self) -> bool:
        """Whether the device wants to hear of what was added since the last call (§2.7.13)."""
        old, self._kicked = self._kicked, self.next_available
        if not self.event_index:
            return not self.u16(self.used_ring) & 1
        event = self.u16(self.used_ring + 4 + 8 * self.size)
        return (self.next_available - event - 1) & 0xFFFF < (self.next_available - old) & 0xFFFF


def pack_descriptor(address: int, length: int, flags: int = 0, following: int = 0) -> bytes:
    """struct virtq_desc."""
    return struct.pack("<QIHH", address, length, flags, following)


class EchoDevice(VirtioDevice):
    """Writes back, in capitals, what it reads: the smallest device that is one."""

    device_id: ClassVar[int] = 42

    def __init__(self, queues: int = 1, size: int = 64) -> None:
        self.queue_sizes = (size,) * queues
        self.features = 1
        self.resets = 0
        self.echoed = 0

    def read_config(self, offset: int, length: int) -> bytes:
        return b"capitals"[offset : offset + length].ljust(length, b"\0")

    async def run(self, queues: Sequence[Queue]) -> None:
        async with trio.open_nursery() as nursery:
            for queue in queues:
                nursery.start_soon(self._serve, queue)

    async def _serve(self, queue: Queue) -> None:
        while True:
            await queue.wait()
            while (chain := queue.pop()) is not None:
                written = 0
                for source, target in zip(chain.readable, chain.writable, strict=False):
                    size = min(len(source), len(target), 4096)
                    target[:size] = bytes(source[:size]).upper()
                    written += size
                queue.push(chain, written)
                self.echoed += 1
            queue.interrupt()

    def reset(self) -> None:
        self.resets += 1

    def save(self) -> bytes:
        return self.echoed.to_bytes(8, "little")

    def load(self, state: bytes) -> None:
        if len(state) != 8:
            raise ValueError("not the state of an echo device")
        self.echoed = int.from_bytes(state, "little")


class ShellQueue:
    """A queue as a device gets it."""

    def __init__(self, shell: Shell, index: int, queue: Virtqueue | None) -> None:
        self._shell = shell
        self._index = index
        self._queue = queue
        self.kicked = trio.Event()

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()
        while self._queue is None or not self._queue.enable_kicks():
            await self.kicked.wait()
            self.kicked = trio.Event()

    def pop(self) -> Chain | None:
        return self._queue.pop() if self._queue else None

    def push(self, chain: Chain, written: int = 0) -> None:
        assert self._queue is not None
        self._queue.push(chain, written)

    def interrupt(self) -> None:
        if self._queue and self._queue.should_interrupt():
            self._shell.function.interrupt_queue(self._index)


@attrs.define(eq=False)
class Shell:
    """What an engine does for a function, all in one thread; and a record of what it was told."""

    nursery: trio.Nursery | None = None
    signals: list[int] = attrs.Factory(list)
    changed: list[int] = attrs.Factory(list)
    doorbells: list[int | None] = attrs.Factory(list)
    kicks: list[int] = attrs.Factory(list)
    starts: int = 0
    resets: int = 0
    faults: list[Exception] = attrs.Factory(list)
    queues: list[ShellQueue] = attrs.Factory(list)
    function: transport.VirtioPciFunction = attrs.field(init=False)
    signalled: trio.Event = attrs.Factory(trio.Event)
    _scope: trio.CancelScope | None = None
    _ended: trio.Event = attrs.Factory(trio.Event)

    def driver_ok(self) -> None:
        self.starts += 1
        if self.nursery is not None:
            self.start()

    def start(self) -> None:
        """Run the device: after DRIVER_OK, and again after :meth:`pause`."""
        assert self.nursery is not None
        assert self._scope is None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self.queues = [ShellQueue(self, i, q) for i, q in enumerate(self.function.virtqueues)]
        self.nursery.start_soon(self._run, self._scope)

    async def _run(self, scope: trio.CancelScope) -> None:
        with scope:
            try:
                for queue in self.queues:
                    queue.interrupt()
                await self.function.device.run(self.queues)
            except* (QueueFault, GuestMemoryError) as group:
                self.faults.append(group)
                self.function.fail()
        self._scope = None
        self._ended.set()
        self.function.finish_reset()

    async def pause(self) -> None:
        """End `run`, as for a snapshot."""
        if self._scope is not None:
            self._scope.cancel()
            with trio.CancelScope(shield=True):
                await self._ended.wait()

    def reset_requested(self) -> None:
        self.resets += 1
        if self._scope is not None:
            self._scope.cancel()
        elif self.nursery is not None:
            self.function.finish_reset()  # it has failed before

    def kick(self, queue: int) -> None:
        self.kicks.append(queue)
        if queue < len(self.queues):
            self.queues[queue].kicked.set()

    def signal(self, vector: int) -> None:
        assert self.function.message(vector) is not None
        self.signals.append(vector)
        self.signalled.set()
        self.signalled = trio.Event()

    def vectors_changed(self, vector: int) -> None:
        self.changed.append(vector)

    def doorbells_moved(self, address: int | None) -> None:
        self.doorbells.append(address)


def plug(
    device: VirtioDevice,
    memory: GuestMemory,
    shell: Shell,
    bus: PciBus | None = None,
    slot: int = 1,
) -> tuple[PciBus, transport.VirtioPciFunction]:
    """A function for ``device`` on a bus."""
    bus = bus or PciBus(WINDOW, WINDOW_SIZE)
    shell.function = transport.VirtioPciFunction(device, memory, shell)
    bus.add(shell.function, device=slot)
    return bus, shell.function


class PciDriver:
    """A driver that knows of its function only what it finds through the bus."""

    def __init__(self, bus: PciBus, slot: int = 1) -> None:
        self._bus = bus
        self._ecam = 8 * slot * ECAM_FUNCTION_SIZE
        self.vendor = self.config(0, 2)
        self.device = self.config(2, 2)
        self.parts: dict[int, int] = {}
        self.msix = 0
        self.multiplier = 0
        at = self.config(0x34, 1)
        while at:
            kind = self.config(at, 1)
            if kind == CAP_MSIX:
                self.msix = at
                self.table = self.config(at + 4, 4)
                self.pending = self.config(at + 8, 4)
            elif kind == CAP_VENDOR:
                what = self.config(at + 3, 1)
                self.parts[what] = self.config(at + 8, 4)
                if what == transport.CAP_NOTIFY_CFG:
                    self.multiplier = self.config(at + 16, 4)
                elif what == transport.CAP_PCI_CFG:
                    self.window = at
            at = self.config(at + 1, 1)
        self.bar = self.config(0x10, 4) & ~0xF | self.config(0x14, 4) << 32

    def config(self, register: int, size: int) -> int:
        return self._bus.read(self._ecam + register, size)

    def set_config(self, register: int, size: int, value: int) -> None:
        self._bus.write(self._ecam + register, size, value)

    def read(self, offset: int, size: int) -> int:
        """From the BAR, where it answers."""
        found = self._bus.find(self.bar + offset)
        assert found is not None
        function, at = found
        return function.read_bar(at, size)

    def write(self, offset: int, size: int, value: int) -> None:
        found = self._bus.find(self.bar + offset)
        assert found is not None
        function, at = found
        function.write_bar(at, size, value)

    def get(self, register: int, size: int) -> int:
        """A register of the common configuration."""
        return self.read(self.parts[transport.CAP_COMMON_CFG] + register, size)

    def set(self, register: int, size: int, value: int) -> None:
        self.write(self.parts[transport.CAP_COMMON_CFG] + register, size, value)

    @property
    def status(self) -> int:
        return self.get(common.DEVICE_STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.set(common.DEVICE_STATUS, 1, value)

    def enable(self) -> None:
        """Memory decoding on, MSI-X on, one message for each vector."""
        self.set_config(4, 2, 6)
        self.set_config(self.msix + 2, 2, 0xC000)
        for vector in range((self.config(self.msix + 2, 2) & 0x7FF) + 1):
            at = self.table + 16 * vector
            for offset, value in ((0, 0xFEE0_0000), (4, 0), (8, 0x4020 + vector), (12, 0)):
                self.write(at + offset, 4, value)
        self.set_config(self.msix + 2, 2, 0x8000)

    def offered(self) -> int:
        features = 0
        for select in (0, 1):
            self.set(common.DEVICE_FEATURE_SELECT, 4, select)
            features |= self.get(common.DEVICE_FEATURE, 4) << 32 * select
        return features

    def accept(self, features: int) -> bool:
        """Negotiate; False if the device will not have it."""
        self.status = STATUS_ACKNOWLEDGE
        self.status = STATUS_ACKNOWLEDGE | STATUS_DRIVER
        for select in (0, 1):
            self.set(common.DRIVER_FEATURE_SELECT, 4, select)
            self.set(common.DRIVER_FEATURE, 4, features >> 32 * select & 0xFFFF_FFFF)
        self.status = self.status | STATUS_FEATURES_OK
        return bool(self.status & STATUS_FEATURES_OK)

    def set_queue(self, index: int, ring: Ring) -> None:
        self.set(common.QUEUE_SELECT, 2, index)
        self.set(common.QUEUE_SIZE, 2, ring.size)
        self.set(common.QUEUE_MSIX_VECTOR, 2, index + 1)
        for register, address in (
            (common.QUEUE_DESC, ring.descriptors),
            (common.QUEUE_DRIVER, ring.available),
            (common.QUEUE_DEVICE, ring.used_ring),
        ):
            self.set(register, 4, address & 0xFFFF_FFFF)
            self.set(register + 4, 4, address >> 32)
        self.set(common.QUEUE_ENABLE, 2, 1)

    def start(self, rings: Sequence[Ring], features: int | None = None) -> None:
        """All the way to DRIVER_OK (§3.1.1)."""
        self.enable()
        assert self.accept(self.offered() if features is None else features)
        self.set(common.CONFIG_MSIX_VECTOR, 2, 0)
        for index, ring in enumerate(rings):
            self.set_queue(index, ring)
        self.status = self.status | STATUS_DRIVER_OK

    def notify(self, queue: int) -> None:
        """As an exit, where no ioeventfd is."""
        self.write(self.parts[transport.CAP_NOTIFY_CFG] + self.multiplier * queue, 2, queue)
