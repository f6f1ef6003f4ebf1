"""A virtio disk is its file: whatever the requests, and whatever a driver makes of them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine.devices import diskfile
from trio_supermachine.devices.blk import (
    F_DISCARD,
    F_FLUSH,
    F_RO,
    F_WRITE_ZEROES,
    SECTOR,
    BlkDevice,
    RequestType,
    Status,
)
from trio_supermachine.devices.virtqueue import QueueFault

from ..support.device_driver import Buffer, Driver

SECTORS = 64
CONTENT = bytes(n % 251 for n in range(SECTORS * SECTOR))
MIB = 1 << 20
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = RequestType


@pytest.fixture
def disk() -> Iterator[int]:
    with TemporaryFile() as file:
        file.write(CONTENT)
        file.flush()
        yield file.fileno()


def make_driver(device: BlkDevice, room: int = 1 << 17) -> Driver:
    return Driver(device, room, sizes=[16])


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


def cut(data: bytes, points: list[int]) -> list[bytes]:
    """``data`` in parts, none of them empty."""
    at = sorted({0, len(data), *(point % (len(data) + 1) for point in points)})
    return [data[a:b] for a, b in pairwise(at)]


async def do(
    driver: Driver,
    kind: int,
    sector: int = 0,
    data: bytes = b"",
    room: int = 0,
    cuts: list[int] | None = None,
) -> tuple[Status, bytes]:
    """One request: its status, and what it read."""
    points = cuts or [16]
    readable = cut(header(kind, sector) + data, points)
    writable = [len(part) for part in cut(bytes(room + 1), points if cuts else [room])]
    buffer = add(driver, readable, writable)
    ((used, written),) = await driver.queues[0].wait_used()
    assert used is buffer
    assert written <= room + 1
    status = Status(buffer.writable[-1][-1])
    if kind == IN:
        assert written == (room + 1 if status is Status.OK else 1)
    return status, buffer.written[:-1]


def add(driver: Driver, readable: list[bytes], writable: list[int]) -> Buffer:
    buffer = driver.queues[0].add(readable, writable)
    if writable:
        buffer.writable[-1][-1] = 0xEE
    driver.queues[0].kick()
    return buffer


_cuts = st.lists(st.integers(0, 1 << 16), max_size=6)
_sector = st.integers(0, SECTORS)
_count = st.integers(0, 9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([IN, OUT, FLUSH, DISCARD, WRITE_ZEROES]),
            _sector,
            _count,
            _cuts,
            st.integers(0, 255),
        ),
        max_size=20,
    ),
    st.booleans(),
    st.booleans(),
)
def test_the_disk_is_like_an_array_of_bytes(
    requests: list[tuple[RequestType, int, int, list[int], int]], in_cache: bool, flushes: bool
) -> None:
    async def main(fd: int) -> None:
        model = bytearray(CONTENT)
        device = BlkDevice(fd, readonly=False)
        device._nowait = in_cache
        driver = make_driver(device)
        if not flushes:
            device.driver_features &= ~F_FLUSH
        async with driver.running():
            for kind, sector, count, cuts, stamp in requests:
                start, end = sector * SECTOR, (sector + count) * SECTOR
                fits = 0 < count <= SECTORS - sector
                expected = Status.OK if fits or kind is FLUSH else Status.IOERR
                data, room = b"", 0
                if kind is OUT:
                    data = bytes([stamp]) * (count * SECTOR)
                elif kind is IN:
                    room = count * SECTOR
                elif kind is not FLUSH:
                    data = segment(sector, count, stamp & 1 if kind is WRITE_ZEROES else 0)
                status, got = await do(driver, kind, sector, data, room, cuts)
                assert status is expected
                if status is Status.OK:
                    if kind is IN:
                        assert got == model[start:end]
                    elif kind is OUT:
                        model[start:end] = data
                    elif kind is WRITE_ZEROES:
                        model[start:end] = bytes(end - start)
                    elif kind is DISCARD:
                        model[start:end] = os.pread(fd, end - start, start)
        assert os.pread(fd, len(CONTENT) + 1, 0) == model

    with TemporaryFile() as file:
        file.write(CONTENT)
        file.flush()
        trio.run(main, file.fileno())


async def test_many_requests_at_once_are_each_answered(disk: int) -> None:
    driver = make_driver(BlkDevice(disk, readonly=False))
    async with driver.running():
        expected = {}
        for n in range(15):
            if n % 3:
                buffer = add(driver, [header(IN, n)], [SECTOR, 1])
            else:
                buffer = add(driver, [header(OUT, 40 + n), bytes([n]) * SECTOR], [1])
            expected[buffer] = SECTOR + 1 if n % 3 else 1
        used: dict[Buffer, int] = {}
        while len(used) < len(expected):
            used.update(await driver.queues[0].wait_used())
    assert used == expected
    assert driver.queues[0].interrupts <= 3
    for n in range(15):
        assert n % 3 or os.pread(disk, SECTOR, (40 + n) * SECTOR) == bytes([n]) * SECTOR


async def test_what_is_out_of_bounds_or_unknown_is_refused(disk: int) -> None:
    driver = make_driver(BlkDevice(disk, readonly=False))
    async with driver.running():
        for kind, sector, data, room, status in [
            (IN, SECTORS, b"", SECTOR, Status.IOERR),
            (IN, SECTORS - 1, b"", 2 * SECTOR, Status.IOERR),
            (IN, 2**64 - 1, b"", SECTOR, Status.IOERR),
            (IN, 2**55, b"", SECTOR, Status.IOERR),
            (IN, 0, b"", SECTOR - 1, Status.IOERR),
            (IN, 0, b"", 0, Status.IOERR),
            (OUT, 0, b"", 0, Status.IOERR),
            (OUT, 0, bytes(SECTOR + 1), 0, Status.IOERR),
            (OUT, SECTORS, bytes(SECTOR), 0, Status.IOERR),
            (GET_ID, 0, b"", 0, Status.IOERR),
            (DISCARD, 0, segment(0, 0), 0, Status.IOERR),
            (DISCARD, 0, segment(SECTORS, 1), 0, Status.IOERR),
            (DISCARD, 0, segment(2**64 - 1, 2), 0, Status.IOERR),
            (DISCARD, 0, segment(0, 0xFFFF_FFFF), 0, Status.IOERR),
            (DISCARD, 0, segment(0, 1, 1), 0, Status.UNSUPP),
            (DISCARD, 0, segment(0, 1)[:15], 0, Status.IOERR),
            (DISCARD, 0, segment(0, 1) * 2, 0, Status.IOERR),
            (DISCARD, 0, b"", 0, Status.IOERR),
            (WRITE_ZEROES, 0, segment(0, 0x1_0001), 0, Status.IOERR),
            (WRITE_ZEROES, 0, segment(0, 1, 2), 0, Status.UNSUPP),
            (2, 0, b"", SECTOR, Status.UNSUPP),
            (0xFFFF_FFFF, 0, bytes(100), 100, Status.UNSUPP),
        ]:
            assert (await do(driver, kind, sector, data, room))[0] is status, (kind, sector)
    assert os.pread(disk, len(CONTENT) + 1, 0) == CONTENT


async def test_a_header_may_be_cut_short_but_a_status_needs_its_place(disk: int) -> None:
    driver = make_driver(BlkDevice(disk, readonly=True))
    async with driver.running():
        for readable in ([], [b"x"], [header(IN)[:15]]):
            buffer = add(driver, readable, [SECTOR, 1])
            await driver.queues[0].wait_used()
            assert buffer.writable[-1][-1] == Status.IOERR
    add(driver, [header(IN)], [])
    with pytest.raises(QueueFault, match="status"):
        await driver.run()


async def test_a_transfer_that_is_too_large_is_refused_before_it_is_begun() -> None:
    with TemporaryFile() as file:
        file.truncate(40 * MIB)
        driver = Driver(BlkDevice(file.fileno(), readonly=False), 33 * MIB, sizes=[1])
        async with driver.running():
            status, got = await do(driver, IN, 0, room=32 * MIB)
            assert status is Status.OK
            assert got == bytes(32 * MIB)
            status, _ = await do(driver, IN, 0, room=32 * MIB + SECTOR)
            assert status is Status.IOERR


async def test_a_read_only_disk_stays_as_it_is(disk: int) -> None:
    device = BlkDevice(disk, readonly=True)
    assert device.features & F_RO
    assert not device.features & (F_DISCARD | F_WRITE_ZEROES)
    driver = make_driver(device)
    async with driver.running():
        assert await do(driver, IN, 3, room=SECTOR) == (
            Status.OK,
            CONTENT[3 * SECTOR : 4 * SECTOR],
        )
        assert (await do(driver, FLUSH))[0] is Status.OK
        for kind, data in [
            (OUT, bytes(SECTOR)),
            (DISCARD, segment(0, 1)),
            (WRITE_ZEROES, segment(0, 1)),
        ]:
            assert (await do(driver, kind, 0, data))[0] is Status.IOERR
    assert os.pread(disk, len(CONTENT) + 1, 0) == CONTENT


@pytest.mark.parametrize("room", [1, 19, 20, 100])
async def test_the_serial_number_has_20_bytes(disk: int, room: int) -> None:
    driver = make_driver(BlkDevice(disk, readonly=True, serial="a-layer"))
    async with driver.running():
        status, got = await do(driver, GET_ID, room=room)
    assert status is Status.OK
    assert got == b"a-layer".ljust(20, b"\0")[:room].ljust(room, b"\0")


@pytest.mark.parametrize("in_cache", [True, False])
async def test_a_file_that_has_become_shorter_is_an_input_error(disk: int, in_cache: bool) -> None:
    device = BlkDevice(disk, readonly=False)
    device._nowait = in_cache
    os.ftruncate(disk, 10 * SECTOR + 100)
    driver = make_driver(device)
    async with driver.running():
        assert (await do(driver, IN, 10, room=SECTOR))[0] is Status.IOERR
        assert (await do(driver, IN, 30, room=SECTOR))[0] is Status.IOERR
        assert (await do(driver, IN, 9, room=SECTOR))[0] is Status.OK


async def test_a_write_to_a_file_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    with path.open("rb") as file:
        driver = make_driver(BlkDevice(file.fileno(), readonly=False))
        async with driver.running():
            assert (await do(driver, OUT, 0, bytes(SECTOR)))[0] is Status.IOERR
            for kind in (DISCARD, WRITE_ZEROES):
                assert (await do(driver, kind, 0, segment(0, 1)))[0] is Status.IOERR


async def test_discarded_and_unmapped_ranges_are_given_back() -> None:
    with TemporaryFile() as file:
        file.write(b"x" * MIB)
        file.flush()
        driver = make_driver(BlkDevice(file.fileno(), readonly=False))
        sectors = MIB // SECTOR
        async with driver.running():
            before = os.fstat(file.fileno()).st_blocks
            assert (await do(driver, DISCARD, 0, segment(0, sectors // 2)))[0] is Status.OK
            half = os.fstat(file.fileno()).st_blocks
            assert half < before
            await do(driver, WRITE_ZEROES, 0, segment(sectors // 2, sectors // 2, 1))
            assert os.fstat(file.fileno()).st_blocks < half
        assert os.fstat(file.fileno()).st_size == MIB
        assert os.pread(file.fileno(), MIB, 0) == bytes(MIB)


async def test_a_file_system_without_holes_will_do(
    disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None that is at hand lacks them.
    monkeypatch.setattr(diskfile, "_try_fallocate", lambda *_: False)
    driver = make_driver(BlkDevice(disk, readonly=False))
    async with driver.running():
        assert (await do(driver, DISCARD, 0, segment(0, 1)))[0] is Status.OK
        for flags in (0, 1):
            sector = 10 + flags
            assert (await do(driver, WRITE_ZEROES, 0, segment(sector, 1, flags)))[0] is Status.OK
    assert os.pread(disk, len(CONTENT) + 1, 0) == (
        CONTENT[: 10 * SECTOR] + bytes(2 * SECTOR) + CONTENT[12 * SECTOR :]
    )


def test_more_views_than_one_call_takes_are_moved_whole(disk: int) -> None:
    memory = memoryview(bytearray(3000))
    views = [memory[n : n + 1] for n in range(3000)]
    diskfile.read_all(disk, views, 5)
    assert memory == CONTENT[5:3005]
    diskfile.write_all(disk, views, 0)
    assert os.pread(disk, 3000, 0) == memory


@pytest.mark.parametrize("turns", range(8))
async def test_a_cancellation_at_any_point_leaves_no_request_unanswered(
    disk: int, turns: int
) -> None:
    device = BlkDevice(disk, readonly=False)
    device._nowait = False
    driver = make_driver(device)
    (queue,) = driver.queues
    buffers = [add(driver, [header(IN, n)], [SECTOR, 1]) for n in range(4)]
    buffers += [add(driver, [header(OUT, 50 + n), bytes(SECTOR)], [1]) for n in range(4)]
    answered = []
    async with driver.running():  # checks that what was popped has been pushed
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
    answered += [buffer for buffer, _ in queue.used()]
    async with driver.running():
        while len(answered) < len(buffers):
            answered += [buffer for buffer, _ in await queue.wait_used()]
    assert set(answered) == set(buffers)
    assert all(buffer.writable[-1][-1] == Status.OK for buffer in buffers)


async def test_the_configuration_is_that_of_the_disk_and_then_zeros(disk: int) -> None:
    os.ftruncate(disk, 100 * SECTOR + 511)
    device = BlkDevice(disk, readonly=False)

    def read(offset: int, length: int) -> int:
        return int.from_bytes(device.read_config(offset, length), "little")

    assert read(0, 8) == 100  # capacity
    assert read(12, 4) == 254  # seg_max
    assert read(20, 4) == 512  # blk_size
    assert read(34, 2) == 1  # num_queues
    assert [read(at, 4) for at in (36, 40, 44)] == [0x3F_FFFF, 1, 1]  # discard
    assert [read(at, 4) for at in (48, 52)] == [0x1_0000, 1]  # write zeroes
    assert read(56, 1) == 1
    assert device.read_config(59, 8) == device.read_config(1 << 20, 8) == bytes(8)
    device.write_config(0, bytes(8))
    assert read(0, 8) == 100
    assert BlkDevice(disk, readonly=True).read_config(36, 24) == bytes(24)
