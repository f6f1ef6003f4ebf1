"""What streams of vsock carry in tests, over whichever carrier."""

from __future__ import annotations

import trio

from trio_supermachine.vsock.stream import VsockStream

DATA = bytes(range(256)) * 8192  # 2 MiB


async def read_all(stream: VsockStream) -> bytes:
    """Read until the peer's end."""
    return b"".join([chunk async for chunk in stream])


async def exchange(one: VsockStream, two: VsockStream) -> None:
    """Send :data:`DATA` and an end both ways at once, and check what arrives."""
    got: dict[str, bytes] = {}

    async def send(stream: VsockStream) -> None:
        await stream.send_all(DATA)
        await stream.send_eof()

    async def receive(name: str, stream: VsockStream) -> None:
        got[name] = await read_all(stream)

    async with trio.open_nursery() as nursery:
        for name, stream in (("one", one), ("two", two)):
            nursery.start_soon(send, stream)
            nursery.start_soon(receive, name, stream)
    assert got == {"one": DATA, "two": DATA}
