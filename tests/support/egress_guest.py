"""What a guest's agent says when programs connect to the outside, without a guest."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address

import attrs
import trio

from trio_supermachine.agent import wire
from trio_supermachine.agent.wire import FrameType, Protocol
from trio_supermachine.net.datagrams import DatagramStream
from trio_supermachine.net.egress import EgressServer
from trio_supermachine.net.lookup import HostLookups
from trio_supermachine.net.policy import EgressPolicy
from trio_supermachine.vsock.carrier import SocketCarrier
from trio_supermachine.vsock.stream import VsockMux, VsockStream

PORT = wire.EGRESS_PORT
TCP, UDP = Protocol.TCP, Protocol.UDP


@attrs.frozen
class Refused(Exception):
    """The host's ERROR."""

    errno: int
    message: str


def open_frame(protocol: Protocol, address: str, port: int) -> bytes:
    return wire.Open(protocol, ip_address(address), port).encode()


@attrs.frozen
class Agent:
    """The guest's end, and the server on the host's."""

    mux: VsockMux
    server: EgressServer
    host: VsockMux
    #: What carries the packets, for guests that make their own.
    channel: socket.socket

    async def dial(self) -> VsockStream:
        return await self.mux.dial(PORT)

    async def open(self, protocol: Protocol, address: str, port: int) -> VsockStream:
        """A connection out, past the host's OK. :raises Refused: the host's ERROR."""
        stream = await self.dial()
        await stream.send_all(open_frame(protocol, address, port))
        await expect_ok(stream)
        return stream

    async def tcp(self, address: str, port: int) -> VsockStream:
        return await self.open(TCP, address, port)

    async def udp(self, address: str, port: int) -> DatagramStream:
        return DatagramStream(await self.open(UDP, address, port))

    async def resolve(self, query: bytes) -> bytes:
        """Ask the resolver in a datagram of its own."""
        stream = await self.open(UDP, "192.0.0.1", 53)
        flow = DatagramStream(stream)
        assert flow.send_nowait(query)
        answer = await flow.receive()
        assert answer is not None
        stream.abort()
        return answer


async def receive_exactly(stream: VsockStream, size: int) -> bytes:
    got = b""
    while len(got) < size:
        more = await stream.receive_some(size - len(got))
        assert more, got
        got += more
    return got


async def expect_ok(stream: VsockStream) -> None:
    """Read the host's answer and nothing behind it."""
    length, kind, _, _ = struct.unpack("<IBBH", await receive_exactly(stream, 8))
    payload = await receive_exactly(stream, length)
    if kind == FrameType.ERROR:
        error = wire.GuestError.decode(payload)
        raise Refused(error.errno, error.message)
    assert kind == FrameType.OK
    assert payload == bytes(8)


@asynccontextmanager
async def egress(
    policy: EgressPolicy, *, lookups: HostLookups | None = None, backlog: int = 64
) -> AsyncIterator[Agent]:
    """An agent whose host has this policy."""
    left, right = socket.socketpair()
    host = VsockMux(SocketCarrier(left))
    guest = VsockMux(SocketCarrier(right), local_cid=3, peer_cid=2, max_payload=32724)
    server = EgressServer(host.listen(PORT, backlog), policy, lookups=lookups)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.run)
        nursery.start_soon(guest.run)
        async with trio.open_nursery() as serving:
            serving.start_soon(server.run)
            try:
                yield Agent(guest, server, host, right)
            finally:
                serving.cancel_scope.cancel()
        host.close()
        guest.close()
