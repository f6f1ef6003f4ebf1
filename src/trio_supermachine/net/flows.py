"""Flows on connections of the agent that carry no TCP stream: datagrams, and questions of DNS."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import trio

from ..agent.wire import WireError
from ..vsock.stream import VsockStream
from .datagrams import DatagramStream, encode
from .rate import TokenBucket

if TYPE_CHECKING:
    from .resolver import Resolver

#: Seconds of silence in both directions after which a UDP flow ends.
UDP_IDLE: Final = 60.0
#: Seconds without a question after which a connection to the resolver ends.
DNS_IDLE: Final = 15.0
#: Seconds for the guest to take an answer.
_TAKE: Final = 5.0

_RECEIVE: Final = 65536
_PAUSE: Final = 0.1  # seconds, when the kernel has an error in the place of a datagram
_LENGTH: Final = struct.Struct("!H")
_LEFT: Final = (WireError, trio.BrokenResourceError, trio.ClosedResourceError)


async def relay_datagrams(
    stream: VsockStream, peer: trio.socket.SocketType, bucket: TokenBucket | None
) -> None:
    """Move datagrams both ways until the guest leaves, or after :data:`UDP_IDLE` s of silence.

    A datagram for which either side, or ``bucket``, has no room is dropped.

    :param peer: a socket that is connected.
    """
    guest = DatagramStream(stream)
    idle = trio.CancelScope()

    def admits(datagram: bytes) -> bool:
        idle.deadline = trio.current_time() + UDP_IDLE
        return bucket is None or bucket.try_take(len(datagram), trio.current_time())

    async def outward() -> None:
        while (datagram := await guest.receive()) is not None:
            if admits(datagram):
                try:
                    await peer.send(datagram)
                except OSError:
                    pass  # it is lost, as datagrams may be
        idle.cancel()

    async def inward() -> None:
        while True:
            try:
                datagram = await peer.recv(_RECEIVE)
            except OSError:  # ICMP says so; the program in the guest asks again, or gives up
                await trio.sleep(_PAUSE)
                continue
            if admits(datagram):
                guest.send_nowait(datagram)

    with idle:
        idle.deadline = trio.current_time() + UDP_IDLE
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outward)
            nursery.start_soon(inward)


async def serve_dns_datagrams(
    stream: VsockStream, resolver: Resolver, slots: trio.Semaphore
) -> None:
    """Answer questions, one in each datagram, until the guest leaves or is silent for long.

    :param slots: each question takes a place; no more are read while there is none.
    """
    guest = DatagramStream(stream)
    sending = trio.Lock()

    async def answer(query: bytes) -> None:
        try:
            reply = await resolver.answer(query, datagram=True)
            if reply is not None:
                async with sending:
                    await _send(stream, encode(reply))
        finally:
            slots.release()

    with trio.CancelScope() as idle:
        async with trio.open_nursery() as nursery:
            idle.deadline = trio.current_time() + DNS_IDLE
            while (query := await guest.receive()) is not None:
                idle.deadline = trio.current_time() + DNS_IDLE
                await slots.acquire()
                nursery.start_soon(answer, query)
            idle.cancel()


async def serve_dns_stream(stream: VsockStream, resolver: Resolver, slots: trio.Semaphore) -> None:
    """Answer questions of DNS over TCP (RFC 1035, 4.2.2), in their order.

    :raises trio.BrokenResourceError: the guest has left.
    """
    while True:
        query = None
        with trio.move_on_after(DNS_IDLE):
            query = await _receive_message(stream)
        if not query:
            return
        async with slots:
            reply = await resolver.answer(query, datagram=False)
        if reply is None or not await _send(stream, _LENGTH.pack(len(reply)) + reply):
            return


async def receive_exactly(stream: VsockStream, size: int) -> bytes | None:
    """Receive ``size`` bytes and nothing behind them; ``None`` if the data ends before."""
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        if not more:
            return None
        data += more
    return data


async def _receive_message(stream: VsockStream) -> bytes | None:
    head = await receive_exactly(stream, _LENGTH.size)
    if head is None:
        return None
    from .dnsmessage import MAX_QUERY  # with dnspython, which a resolver has loaded by now

    (length,) = _LENGTH.unpack(head)
    return await receive_exactly(stream, length) if length <= MAX_QUERY else None


async def _send(stream: VsockStream, data: bytes) -> bool:
    """Send, or leave a guest that does not take it in time. Return whether it was sent."""
    with trio.move_on_after(_TAKE):
        try:
            await stream.send_all(data)
            return True
        except _LEFT:
            return False
    stream.abort()
    return False
