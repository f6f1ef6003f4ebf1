"""What the vsock muxer costs: two muxers in one program against the bare socket pair below them.

usage: python benchmarks/vsock_mux.py [--rounds N]
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from common import Rows, start

from trio_supermachine.vsock.carrier import SocketCarrier
from trio_supermachine.vsock.stream import VsockMux

Pair = tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]

_TRANSFER = 64 * 1024 * 1024
_CHUNK = 1024 * 1024
_PINGS = 2000


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
    source: trio.abc.HalfCloseableStream, sink: trio.abc.HalfCloseableStream
) -> float:
    """MB/s of one transfer."""
    data = bytes(_CHUNK)

    async def send() -> None:
        for _ in range(_TRANSFER // _CHUNK):
            await source.send_all(data)

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        left = _TRANSFER
        while left:
            left -= len(await sink.receive_some(256 * 1024))
    return _TRANSFER / (time.perf_counter() - start) / 1e6


async def round_trips(
    one: trio.abc.HalfCloseableStream, two: trio.abc.HalfCloseableStream
) -> list[float]:
    """Microseconds of each of many one-byte round trips."""
    times = []

    async def echo() -> None:
        for _ in range(_PINGS):
            await two.send_all(await two.receive_some(1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        for _ in range(_PINGS):
            start = time.perf_counter()
            await one.send_all(b"x")
            await one.receive_some(1)
            times.append((time.perf_counter() - start) * 1e6)
    return times


async def main(rounds: int) -> None:
    rows = Rows()
    makers = {"socket pair": raw_pair, "two muxers": mux_pair}
    for _ in range(rounds):
        for by, maker in makers.items():
            async with maker() as (one, two):
                rows.add("host to guest", await throughput(one, two), "MB/s", by=by)
                rows.add("guest to host", await throughput(two, one), "MB/s", by=by)
                for trip in await round_trips(one, two):
                    rows.add("one-byte round trip", trip, "us", by=by)
    rows.print()


if __name__ == "__main__":
    start(main, __doc__, rounds=5)
