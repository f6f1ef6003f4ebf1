"""Hostile drivers against real devices through the real transport.

A round makes one device on a bus, lets a driver with a seeded generator do a few hundred things
to it, right ones and wrong ones, and then wants the device back: reset, set up, saved and
loaded. Whatever the driver does may cost it the device until it resets it, and nothing else.

Run it for longer by hand: ``python -m tests.support.fuzz_virtio --seconds 60``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import trio

from trio_supermachine.devices import virtio_common as common
from trio_supermachine.devices.blk import BlkDevice
from trio_supermachine.devices.memory import GuestMemory
from trio_supermachine.devices.pci import ECAM_FUNCTION_SIZE
from trio_supermachine.devices.rng import RngDevice
from trio_supermachine.devices.virtio import F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice
from trio_supermachine.devices.virtio_pci import BAR_SIZE, PART_NOTIFY
from trio_supermachine.devices.vsock import VsockDevice
from trio_supermachine.vsock.stream import VsockMux

from .virtio_driver import EchoDevice, PciDriver, Ring, Shell, plug

_LOW_SIZE: Final = 0x40000
_HIGH: Final = 0x1_0000_0000
_HIGH_SIZE: Final = 0x10000
_TABLES: Final = 0x10000
_DATA: Final = 0x20000
_RING_SIZE: Final = 16
_STEPS: Final = 150

#: Values that have meant trouble before.
_ODD: Final = (0, 1, 2, 3, 15, 16, 17, 0xFF, 0x1000, 0xFFFF, 0x10000, 2**31, 2**32 - 1, 2**64 - 1)

#: Gives a device, with what it needs to live.
Target = Callable[[], AbstractAsyncContextManager[VirtioDevice]]


@asynccontextmanager
async def _echo() -> AsyncIterator[VirtioDevice]:
    yield EchoDevice(queues=3)


@asynccontextmanager
async def _rng() -> AsyncIterator[VirtioDevice]:
    yield RngDevice()


@asynccontextmanager
async def _blk() -> AsyncIterator[VirtioDevice]:
    disk = os.memfd_create("disk")
    try:
        os.truncate(disk, 1 << 20)
        yield BlkDevice(disk, readonly=False)
    finally:
        os.close(disk)


@asynccontextmanager
async def _vsock() -> AsyncIterator[VirtioDevice]:
    device = VsockDevice()
    mux = VsockMux(device)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mux.run)
        async with mux.listen(1) as listener:
            nursery.start_soon(_discard, listener, nursery)
            try:
                yield device
            finally:
                nursery.cancel_scope.cancel()
        mux.close()


async def _discard(
    listener: trio.abc.Listener[trio.abc.HalfCloseableStream], nursery: trio.Nursery
) -> None:
    async def take(stream: trio.abc.HalfCloseableStream) -> None:
        async with stream:
            try:
                await stream.send_all(bytes(20000))
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass

    while True:
        nursery.start_soon(take, await listener.accept())


TARGETS: Final[dict[str, Target]] = {
    "echo": _echo,
    "rng": _rng,
    "blk": _blk,
    "vsock": _vsock,
}


class _Attack:
    """One driver, one device, one seed."""

    def __init__(self, device: VirtioDevice, seed: int, nursery: trio.Nursery) -> None:
        self._random = random.Random(seed)
        self._device = device
        self._memory = GuestMemory(
            [
                (0, memoryview(bytearray(_LOW_SIZE))),
                (_HIGH, memoryview(bytearray(_HIGH_SIZE))),
            ]
        )
        self._shell = Shell(nursery)
        self._plug()

    def _plug(self) -> None:
        self._bus, self.function = plug(self._device, self._memory, self._shell)
        self._driver = PciDriver(self._bus)
        self._rings: list[Ring] = []
        self._indirect = True

    async def run(self) -> None:
        # A driver that only does wrong gets nowhere: some rounds are nearly right for long.
        malice = self._random.choice((0, 1, 5))
        steps: Sequence[tuple[Callable[[], object], int]] = (
            (self._right_chain, 60),
            (self._notify, 40),
            (self._reset, 1),
            (self._register, 2 * malice),
            (self._config, malice),
            (self._wrong_chain, malice),
            (self._scribble, malice),
        )
        actions = [action for action, weight in steps for _ in range(weight)]
        for _ in range(_STEPS):
            if not self.function.running and self._random.random() < 0.3:
                await self._set_up(malice)
            self._random.choice(actions)()
            for _ in range(self._random.choice((0, 0, 1, 3))):
                await trio.lowlevel.checkpoint()
            if self._random.random() < 0.02:
                await self._snapshot()
        await self._recover()
        await self._shell.pause()

    # --- what it does ---

    def _value(self) -> int:
        return self._random.choice((self._random.choice(_ODD), self._random.getrandbits(64)))

    def _place(self) -> int:
        base = self._random.choice((0, 0x1000, _TABLES, _DATA, _LOW_SIZE, _HIGH, 2**64 - 64))
        return max(0, base + self._random.randrange(-64, 4096)) & (1 << 64) - 1

    async def _set_up(self, malice: int) -> None:
        """As it should be done, or nearly."""
        await self._find_again()
        dropped = self._random.choice((0, 0, F_EVENT_IDX, F_INDIRECT_DESC))
        self._indirect = malice > 1 or not dropped & F_INDIRECT_DESC
        self._rings = self._new_rings(event_index=not dropped & F_EVENT_IDX)
        if self._random.random() < 0.02 * malice:
            self._rings[0].used_ring = self._place()
        rings = self._rings[: self._random.choice((1, 3)) if malice > 1 else None]
        self._driver.start(rings, self._driver.offered() & ~dropped)

    async def _find_again(self) -> None:
        """Wherever its BAR may be by now, and whatever it does."""
        self._driver.set_config(0x10, 8, self._driver.bar)
        self._driver.enable()
        self._driver.status = 0
        while self._driver.status:
            await trio.lowlevel.checkpoint()

    def _new_rings(self, *, event_index: bool) -> list[Ring]:
        return [
            Ring(self._memory, 0x1000 * (1 + at), min(_RING_SIZE, limit), event_index=event_index)
            for at, limit in enumerate(self._device.queue_sizes)
        ]

    def _register(self) -> None:
        offset = self._random.choice(
            (
                self._random.randrange(common.COMMON_SIZE),
                0x3000 + self._random.randrange(0x60),
                self._random.randrange(BAR_SIZE),
            )
        )
        size = self._random.choice((1, 2, 4, 8, self._random.randrange(1, 9)))
        if self._random.random() < 0.3:
            self.function.read_bar(offset, size)
        else:
            self.function.write_bar(offset, size, self._value() & (1 << 8 * size) - 1)

    def _config(self) -> None:
        offset = ECAM_FUNCTION_SIZE * self._random.choice((0, 8, 8, 8, 9, 255))
        offset += self._random.choice(
            (self._random.randrange(0x100), self._random.randrange(ECAM_FUNCTION_SIZE))
        )
        size = self._random.randrange(1, 9)
        if self._random.random() < 0.5:
            self._bus.read(offset, size)
        else:
            self._bus.write(offset, size, self._value() & (1 << 8 * size) - 1)

    def _right_chain(self) -> None:
        """A request, or a part of one, in buffers that are there."""
        if not self._rings:
            return
        which = self._random.randrange(len(self._rings))
        ring = self._rings[which]
        if ring.used_ring + 8 * ring.size + 6 > _LOW_SIZE:
            return
        ring.used()
        header = self._header()
        at = _DATA + self._random.randrange(0x8000)
        self._memory.write(at, header)
        readable = [(at, len(header)), *self._parts()][self._random.choice((0, 0, 0, 1)) :]
        writable = self._parts()
        indirect = self._indirect and self._random.random() < 0.5
        if not readable + writable or len(ring.free) < len(readable + writable):
            return
        table = _TABLES + 0x2000 * which + 0x200 * ring.free[-1]
        ring.add(readable, writable, table=table if indirect else None)

    def _parts(self) -> list[tuple[int, int]]:
        return [
            (
                self._random.choice((_DATA, _HIGH)) + self._random.randrange(0x8000),
                self._random.choice((1, 16, 44, 512, 1024, 4096, 0x8000)),
            )
            for _ in range(self._random.randrange(3))
        ]

    def _header(self) -> bytes:
        """What a device may take for a request: of blk, of vsock, or nothing."""
        kind = self._random.randrange(3)
        if kind == 0:
            return struct.pack(
                "<IIQ",
                self._random.choice((0, 1, 4, 8, 11, 13, 99)),
                0,
                self._random.choice((0, 1, 2047, 2048, self._value())),
            )
        if kind == 1:
            return struct.pack(
                "<QQIIIHHIII",
                self._random.choice((3, 3, 3, 2, self._value())),
                self._random.choice((2, 2, 2, 3)),
                self._random.randrange(4),
                self._random.choice((1, 1, 2)),
                self._random.choice((0, 0, 4, self._value() & 0xFFFF_FFFF)),
                self._random.choice((1, 1, 1, 2)),
                self._random.randrange(9),
                self._random.choice((0, 1, 2, 3)),
                self._random.choice((0, 0x1_0000, 0xFFFF_FFFF)),
                self._value() & 0xFFFF_FFFF,
            )
        return self._random.randbytes(self._random.choice((1, 15, 16, 44, 100)))

    def _wrong_chain(self) -> None:
        if not self._rings:
            return
        ring = self._random.choice(self._rings)
        for _ in range(self._random.randrange(1, 4)):
            ring.set_descriptor(
                self._random.randrange(ring.size),
                self._place(),
                self._value() & 0xFFFF_FFFF,
                self._random.choice((0, 1, 2, 3, 4, 5, 7, self._value() & 0xFFFF)),
                self._random.choice((0, 1, ring.size - 1, self._value() & 0xFFFF)),
            )
        ring.publish(self._random.choice((0, 1, ring.size - 1, self._value() & 0xFFFF)))

    def _scribble(self) -> None:
        at = self._random.choice((0x1000, 0x2000, _TABLES)) + self._random.randrange(0x400)
        self._memory.write(at, self._random.randbytes(self._random.randrange(1, 40)))

    def _notify(self) -> None:
        queue = self._random.randrange(4)
        self.function.write_bar(PART_NOTIFY + 4 * queue, 2, queue)

    def _reset(self) -> None:
        self.function.write_bar(common.DEVICE_STATUS, 1, 0)

    # --- what has to work whatever it has done ---

    async def _snapshot(self) -> None:
        """The state is JSON, and another function of the device goes on from it."""
        await self._shell.pause()
        state = json.loads(json.dumps(self._bus.save()))
        rings = self._rings
        self._plug()
        self._bus.load(state)
        self._rings = rings
        assert self._bus.save() == state

    async def _recover(self) -> None:
        await self._find_again()
        self._rings = self._new_rings(event_index=True)
        faults = len(self._shell.faults)
        self._driver.start(self._rings)
        assert self.function.running
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        assert len(self._shell.faults) == faults


async def fuzz(target: str, seed: int) -> None:
    """One round. :raises Exception: whatever a driver must not be able to cause."""
    try:
        with trio.fail_after(60):
            async with TARGETS[target]() as device, trio.open_nursery() as nursery:
                await _Attack(device, seed, nursery).run()
                nursery.cancel_scope.cancel()
    except BaseException as error:
        error.add_note(f"fuzz target {target}, seed {seed}")
        raise


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--seed", type=int, help="one round of this seed")
    options = parser.parse_args()
    targets = options.target or sorted(TARGETS)
    if options.seed is not None:
        for target in targets:
            await fuzz(target, options.seed)
        return
    first = seed = random.SystemRandom().getrandbits(48)
    print(f"first seed {first}")
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        for target in targets:
            await fuzz(target, seed)
        seed += 1
    print(f"{seed - first} rounds of {', '.join(targets)}")


if __name__ == "__main__":
    trio.run(_main)
