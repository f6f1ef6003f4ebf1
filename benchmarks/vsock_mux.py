"""What the vsock muxer costs: two muxers in one program beside the bare socket pair below them."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from common import MIB, start
from table import Rows

from trio_supermachine.vsock.carrier import SocketCarrier
from trio_supermachine.vsock.stream import VsockMux

Pair = tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]

BARE, MUXED = "socket pair", "two muxers"
OUT, IN, TRIP = "host to guest", "guest to host", "one-byte round trip"


@asynccontextmanager
async def raw_pair() -> AsyncIterator[Pair]:
    left, right = trio.socket.socketpair()
    async with trio.SocketStream(left) as one, trio.SocketStream(right) as two:
        yield one, two


@asynccontextmanager
async def mux_pair() -> AsyncIterator[Pair]:
    left, right = socket.socketpair()
    host = VsockMux(SocketCarrier(left))
    guest = VsockMux(SocketCarrier(right), local_cid=3, peer_cid=2, max_payload=32724)
    listener = guest.listen(1028)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.run)
        nursery.start_soon(guest.run)
        one = await host.dial(1028)
        async with one, await listener.accept() as two:
            yield one, two
        host.close()
        guest.close()


async def throughput(
    source: trio.abc.HalfCloseableStream, sink: trio.abc.HalfCloseableStream, mib: int
) -> float:
    """MB/s of one transfer."""
    data = bytes(MIB)

    async def send() -> None:
        for _ in range(mib):
            await source.send_all(data)

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        left = mib * MIB
        while left:
            left -= len(await sink.receive_some(256 * 1024))
    return mib * MIB / (time.perf_counter() - start) / 1e6


async def round_trips(
    one: trio.abc.HalfCloseableStream, two: trio.abc.HalfCloseableStream, count: int
) -> list[float]:
    """Microseconds of each of many one-byte round trips."""
    times = []

    async def echo() -> None:
        for _ in range(count):
            await two.send_all(await two.receive_some(1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        for _ in range(count):
            start = time.perf_counter()
            await one.send_all(b"x")
            await one.receive_some(1)
            times.append((time.perf_counter() - start) * 1e6)
    return times


async def main(rounds: int, mib: int, count: int) -> AsyncIterator[Rows]:
    rows = Rows(title=f"{rounds} rounds of {mib} MiB and {count} round trips")
    for name in (OUT, IN, TRIP):
        rows.compare(name, by=BARE)
    for _ in range(rounds):
        for by, pair in ((BARE, raw_pair), (MUXED, mux_pair)):
            async with pair() as (one, two):
                rows.add(OUT, await throughput(one, two, mib), "MB/s", by=by)
                rows.add(IN, await throughput(two, one, mib), "MB/s", by=by)
                for trip in await round_trips(one, two, count):
                    rows.add(TRIP, trip, "us", by=by)
    yield rows


if __name__ == "__main__":
    start(main, __doc__, rounds=(5, 1), mib=(64, 1), count=(2000, 20))
