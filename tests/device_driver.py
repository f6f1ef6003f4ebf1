"""The driver's side of a device's queues, and the Trio shell that a device needs round its own.

A buffer lies in a slot of the queue: a table of descriptors, and then its parts.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import attrs
import trio

from trio_supermachine.devices.memory import GuestMemory
from trio_supermachine.devices.virtio import VirtioDevice
from trio_supermachine.devices.virtqueue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    Chain,
    QueueState,
    Virtqueue,
)

_DESCRIPTOR = struct.Struct("<QIHH")
_U16 = struct.Struct("<H")
_U32X2 = struct.Struct("<II")
_TABLE = 16 * 256


class Signal:
    """Set by one side, awaited by the other, cleared by the wait."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = trio.Event()


@attrs.frozen(eq=False)
class Buffer:
    """What the driver made available: ``readable`` and ``writable`` are views of its parts."""

    slot: int
    readable: tuple[memoryview, ...]
    writable: tuple[memoryview, ...]

    @property
    def written(self) -> bytes:
        """What the device may have written."""
        return b"".join(self.writable)


class DriverQueue:
    """One queue; the driver's side is here, the device's is :attr:`device`."""

    def __init__(self, memory: GuestMemory, start: int, *, size: int, slot_size: int) -> None:
        self.memory = memory
        self.size = size
        self.slot_size = _TABLE + slot_size + 15 & ~15
        self.kicked = Signal()
        self.interrupted = Signal()
        self.interrupts = 0
        self._descriptors = start
        self._available = start + 16 * size
        self._used = self._available + 6 + 2 * size + 3 & ~3
        self._slots = self._used + 6 + 8 * size + 15 & ~15
        self.end = self._slots + size * self.slot_size
        self._free = list(range(size))
        self._out: dict[int, Buffer] = {}
        self._next_available = 0
        self._next_used = 0
        self.attach()

    def attach(self, state: QueueState | None = None) -> None:
        """A new device's side, which goes on from ``state``."""
        self.device = DeviceQueue(
            self,
            Virtqueue(
                self.memory,
                size=self.size,
                descriptors=self._descriptors,
                available=self._available,
                used=self._used,
                event_index=False,
                state=state,
            ),
        )

    @property
    def free(self) -> int:
        """How many more buffers can be made available."""
        return len(self._free)

    def add(
        self, readable: Sequence[bytes | memoryview] = (), writable: Sequence[int] = ()
    ) -> Buffer:
        """Make a buffer available: parts with contents, then parts of some sizes."""
        slot = self._free.pop()
        table = self._slots + slot * self.slot_size
        at = table + _TABLE
        parts = [(len(part), 0) for part in readable] + [(n, DESC_F_WRITE) for n in writable]
        views = []
        entries = []
        for index, (length, flags) in enumerate(parts, 1):
            views.append(self.memory.view(at, length))
            flags |= DESC_F_NEXT if index < len(parts) else 0
            entries.append(_DESCRIPTOR.pack(at, length, flags, index))
            at += length
        assert at - table <= self.slot_size
        for view, part in zip(views, readable, strict=False):
            view[:] = part
        self.memory.write(table, b"".join(entries))
        descriptor = _DESCRIPTOR.pack(table, 16 * len(parts), DESC_F_INDIRECT, 0)
        self.memory.write(self._descriptors + 16 * slot, descriptor)
        buffer = Buffer(slot, tuple(views[: len(readable)]), tuple(views[len(readable) :]))
        self._out[slot] = buffer
        ring = self._available + 4 + 2 * (self._next_available % self.size)
        self.memory.write(ring, _U16.pack(slot))
        self._next_available = self._next_available + 1 & 0xFFFF
        self.memory.write(self._available + 2, _U16.pack(self._next_available))
        return buffer

    def kick(self) -> None:
        self.kicked.set()

    def used(self) -> list[tuple[Buffer, int]]:
        """Buffers that the device has given back, with the numbers of bytes written."""
        found = []
        while self._next_used != _U16.unpack(self.memory.read(self._used + 2, 2))[0]:
            ring = self._used + 4 + 8 * (self._next_used % self.size)
            slot, written = _U32X2.unpack(self.memory.read(ring, 8))
            found.append((self._out.pop(slot), written))
            self._free.append(slot)
            self._next_used = self._next_used + 1 & 0xFFFF
        return found

    async def wait_used(self) -> list[tuple[Buffer, int]]:
        """As :meth:`used`, at least one."""
        while not (found := self.used()):
            await self.interrupted.wait()
        return found


class DeviceQueue:
    """What :meth:`VirtioDevice.run` gets."""

    def __init__(self, driver: DriverQueue, queue: Virtqueue) -> None:
        self.queue = queue
        self._driver = driver
        self.out = 0

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()
        while not self.queue.enable_kicks():
            await self._driver.kicked.wait()
        self.queue.disable_kicks()

    def pop(self) -> Chain | None:
        chain = self.queue.pop()
        self.out += chain is not None
        return chain

    def push(self, chain: Chain, written: int = 0) -> None:
        self.queue.push(chain, written)
        self.out -= 1

    def interrupt(self) -> None:
        if self.queue.should_interrupt():
            self._driver.interrupts += 1
            self._driver.interrupted.set()


class Driver:
    """A driver of one device over memory of its own."""

    def __init__(self, device: VirtioDevice, *slot_sizes: int, sizes: Sequence[int] = ()) -> None:
        self.device = device
        sizes = sizes or device.queue_sizes
        assert len(sizes) == len(slot_sizes) == len(device.queue_sizes)
        room = sum(
            size * (_TABLE + slot + 128) for size, slot in zip(sizes, slot_sizes, strict=True)
        )
        self.memory = GuestMemory([(0x1000, memoryview(bytearray(room)))])
        self.queues: list[DriverQueue] = []
        at = 0x1000
        for size, slot in zip(sizes, slot_sizes, strict=True):
            self.queues.append(DriverQueue(self.memory, at, size=size, slot_size=slot))
            at = self.queues[-1].end + 15 & ~15
        device.driver_features = device.features

    async def run(self) -> None:
        """Run the device until cancelled; then it holds no chain any more."""
        try:
            await self.device.run([queue.device for queue in self.queues])
        finally:
            self.left_over = [queue.device.out for queue in self.queues]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A block in which the device runs; after it, it has given back all that it took."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.run)
            yield
            nursery.cancel_scope.cancel()
        assert not any(self.left_over)
