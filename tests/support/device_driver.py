"""A driver of one device without its bus, and the Trio shell that the device's queues need.

A buffer lies in a slot of its queue: an indirect table, and then its parts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import attrs
import trio

from trio_supermachine.devices.memory import GuestMemory
from trio_supermachine.devices.virtio import VirtioDevice
from trio_supermachine.devices.virtqueue import Chain

from .virtio_driver import Ring

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
        self.kicked = Signal()
        self.interrupted = Signal()
        self.interrupts = 0
        self.ring = Ring(memory, start, size, event_index=True)
        self.device = DeviceQueue(self)
        self._slot_size = _TABLE + (slot_size + 15) // 16 * 16
        self._free = [self.ring.end + n * self._slot_size for n in range(size)]
        self._out: dict[int, Buffer] = {}
        self.end = self.ring.end + size * self._slot_size

    @property
    def free(self) -> int:
        """How many more buffers can be made available."""
        return len(self._free)

    def add(
        self, readable: Sequence[bytes | memoryview] = (), writable: Sequence[int] = ()
    ) -> Buffer:
        """Make a buffer available: parts with contents, then parts of some sizes."""
        slot = self._free.pop()
        at = slot + _TABLE
        parts = []
        for length in (*map(len, readable), *writable):
            parts.append((at, length))
            at += length
        assert at <= slot + self._slot_size
        views = [self.memory.view(*part) for part in parts]
        for view, contents in zip(views, readable, strict=False):
            view[:] = contents
        count = len(readable)
        head = self.ring.add(parts[:count], parts[count:], table=slot)
        buffer = Buffer(slot, tuple(views[:count]), tuple(views[count:]))
        self._out[head] = buffer
        return buffer

    def kick(self) -> None:
        """Notify the device, if it asked for that."""
        if self.ring.wants_kick():
            self.kicked.set()

    def used(self) -> list[tuple[Buffer, int]]:
        """Buffers that the device has given back, with the numbers of bytes written."""
        found = []
        for head, written in self.ring.used():
            buffer = self._out.pop(head)
            self._free.append(buffer.slot)
            found.append((buffer, written))
        return found

    async def wait_used(self) -> list[tuple[Buffer, int]]:
        """As :meth:`used`, at least one."""
        while not (found := self.used()):
            await self.interrupted.wait()
        return found


class DeviceQueue:
    """What :meth:`VirtioDevice.run` gets."""

    def __init__(self, driver: DriverQueue) -> None:
        self.queue = driver.ring.device()
        self._driver = driver
        self.out = 0

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()
        while not self.queue.enable_kicks():
            await self._driver.kicked.wait()

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
        room = 1024 + sum(
            size * (_TABLE + slot + 64) for size, slot in zip(sizes, slot_sizes, strict=True)
        )
        self.memory = GuestMemory([(0x1000, memoryview(bytearray(room)))])
        self.queues: list[DriverQueue] = []
        at = 0x1000
        for size, slot in zip(sizes, slot_sizes, strict=True):
            self.queues.append(DriverQueue(self.memory, at, size=size, slot_size=slot))
            at = self.queues[-1].end
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
