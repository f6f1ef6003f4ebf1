"""A program in a guest that gives back what it reads, while something happens to its VM."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from trio_supermachine import Vm


@asynccontextmanager
async def echoing(vm: Vm, size: int, piece: int) -> AsyncIterator[None]:
    """Send ``size`` bytes through ``cat`` during the block, and check that none is lost.

    :param piece: how many bytes to send at a time.
    """
    data = random.Random(1).randbytes(size)
    echoed = bytearray()
    async with vm.exec(["cat"]) as child, trio.open_nursery() as nursery:

        async def feed() -> None:
            assert child.stdin is not None
            for start in range(0, len(data), piece):
                await child.stdin.send_all(data[start : start + piece])
            await child.stdin.aclose()

        async def collect() -> None:
            async for chunk in child.stdout:
                echoed.extend(chunk)

        nursery.start_soon(feed)
        nursery.start_soon(collect)
        yield
    assert echoed == data
