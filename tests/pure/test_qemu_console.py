"""The console ring: a bounded history with any number of readers."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.hv.console import ConsoleRing


async def collect(ring: ConsoleRing) -> bytes:
    return b"".join([chunk async for chunk in ring])


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 500))
def test_keeps_exactly_the_newest_bytes(chunks: list[bytes], capacity: int) -> None:
    ring = ConsoleRing(capacity)
    for chunk in chunks:
        ring.feed(chunk)
    ring.end()
    newest = b"".join(chunks)[-capacity:]
    assert ring.tail(capacity) == newest
    assert ring.tail(10) == newest[-10:]
    assert trio.run(collect, ring) == newest


async def test_every_reader_gets_all_of_it_as_it_comes() -> None:
    ring = ConsoleRing()
    results: list[bytes] = []

    async def reader() -> None:
        results.append(await collect(ring))

    ring.feed(b"before ")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        ring.feed(b"while ")
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        ring.feed(b"after")
        ring.end()
    assert results == [b"before while after"] * 3


async def test_a_slow_reader_loses_the_oldest_and_never_the_newest() -> None:
    ring = ConsoleRing(4)
    reader = aiter(ring)
    ring.feed(b"ab")
    assert await anext(reader) == b"ab"
    ring.feed(b"cdefgh")
    ring.end()
    assert await anext(reader) == b"efgh"
    assert [chunk async for chunk in reader] == []


async def test_a_cancelled_reader_can_go_on() -> None:
    ring = ConsoleRing()
    reader = aiter(ring)
    with trio.move_on_after(0) as scope:
        await anext(reader)
    assert scope.cancelled_caught
    ring.feed(b"x")
    assert await anext(reader) == b"x"


async def test_reading_at_the_end_is_a_checkpoint() -> None:
    ring = ConsoleRing()
    ring.end()
    with trio.testing.assert_checkpoints():
        assert [chunk async for chunk in ring] == []
    assert ring.tail(0) == b""
