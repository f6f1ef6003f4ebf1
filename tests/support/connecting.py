"""Connections into a guest, and plain TCP beside them as the model."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from trio_supermachine.vsock.stream import VsockStream

from .agent_process import AgentProcess, open_agent

PATIENCE = 120
RESET = struct.pack("ii", 1, 0)
BIG = bytes(range(256)) * 12288  # 3 MiB: more than all that holds anything on the way

#: The host's end, and the program's.
Pair = tuple[trio.abc.HalfCloseableStream, trio.SocketStream]
Maker = Callable[[], Awaitable[Pair]]


async def listen(host: str = "127.0.0.1", port: int = 0) -> tuple[trio.SocketListener, int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = trio.socket.socket(family)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    await sock.bind((host, port))
    sock.listen(4096)
    return trio.SocketListener(sock), sock.getsockname()[1]


@asynccontextmanager
async def connecting() -> AsyncIterator[tuple[AgentProcess, Maker]]:
    async with open_agent() as (client, agent):
        listener, port = await listen()

        async def connect() -> Pair:
            stream, found = await client.connect(port)
            assert found == port
            return stream, await listener.accept()

        async with listener:
            yield agent, connect


@asynccontextmanager
async def plain_tcp() -> AsyncIterator[Maker]:
    listener, port = await listen()

    async def connect() -> Pair:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        return stream, await listener.accept()

    async with listener:
        yield connect


def reset(stream: trio.abc.AsyncResource) -> None:
    if isinstance(stream, VsockStream):
        stream.abort()
    else:
        assert isinstance(stream, trio.SocketStream)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        stream.socket.close()


async def until_fds(agent: AgentProcess, count: int) -> None:
    """Until the agent has so many descriptors: it closes a moment after it has said so."""
    with trio.fail_after(PATIENCE):
        while agent.open_fds() != count:  # noqa: ASYNC110
            await trio.sleep(0.001)


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(chunk) async for chunk in stream])
