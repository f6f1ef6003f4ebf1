"""A relayed connection is, to both its ends, the TCP connection that it stands in for.

The relays run as they do between a host and a guest: TCP, a relay, vsock packets over a socket
pair, a relay, TCP. The model is a plain TCP connection on the loopback.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine.net.relay import relay, reset
from trio_supermachine.vsock.carrier import SocketCarrier
from trio_supermachine.vsock.stream import VsockListener, VsockMux, VsockStream

from ..support.guests import PATIENCE

PORT = 1028
BIG = bytes(range(256)) * 8192  # 2 MiB: more than all that holds anything on the way

Pair = tuple[trio.SocketStream, trio.SocketStream]


async def tcp_pair() -> Pair:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        dialed = await trio.open_tcp_stream(*listener.socket.getsockname())
        return dialed, await listener.accept()


@attrs.frozen
class Tunnel:
    """A host and a guest with relays in both."""

    nursery: trio.Nursery
    host: VsockMux
    listener: VsockListener

    async def vsock_pair(self) -> tuple[VsockStream, VsockStream]:
        dialed = await self.host.dial(PORT)
        return dialed, await self.listener.accept()

    async def connect(self) -> Pair:
        """The outer ends of a connection through both relays."""
        client, host_side = await tcp_pair()
        guest_side, server = await tcp_pair()
        host_end, guest_end = await self.vsock_pair()
        self.nursery.start_soon(relay, host_side, host_end)
        self.nursery.start_soon(relay, guest_side, guest_end)
        return client, server


@asynccontextmanager
async def open_tunnel() -> AsyncIterator[Tunnel]:
    left, right = socket.socketpair()
    host = VsockMux(SocketCarrier(left))
    guest = VsockMux(SocketCarrier(right), local_cid=3, peer_cid=2, max_payload=32724)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.run)
        nursery.start_soon(guest.run)
        yield Tunnel(nursery, host, guest.listen(PORT))
        host.close()
        guest.close()
        nursery.cancel_scope.cancel()


async def clogged(stream: trio.abc.SendStream) -> None:
    """Send until nothing on the way takes any more."""
    sent = True
    while sent:
        with trio.move_on_after(0.2) as scope:
            await stream.send_all(bytes(1 << 16))
        sent = not scope.cancelled_caught


async def echo(stream: trio.SocketStream) -> None:
    """Send back what comes, and its end."""
    async with stream:
        try:
            async for chunk in stream:
                await stream.send_all(chunk)
            await stream.send_eof()
        except trio.BrokenResourceError:
            pass


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(chunk) async for chunk in stream])


# --- beside the model ---


@attrs.frozen
class Part:
    """What one end does: sends chunks, ends, and reads by so many bytes."""

    chunks: list[int]
    end: str
    reads: int


@attrs.frozen
class Seen:
    """What one end saw: what it received, and how that ended."""

    data: bytes
    end: str


parts = st.builds(
    Part,
    st.lists(st.one_of(st.integers(1, 50), st.integers(1, 200_000)), max_size=6),
    st.just("eof"),
    st.integers(3000, 100_000),
)


def content(who: int, size: int) -> bytes:
    return bytes((i * (3 + who) + i // 251) & 0xFF for i in range(1021)) * (size // 1021 + 1)


async def play(stream: trio.SocketStream, who: int, part: Part) -> Seen:
    got = bytearray()
    end = ""

    async def send() -> None:
        nonlocal end
        data = content(who, sum(part.chunks))
        sent = 0
        try:
            for size in part.chunks:
                await stream.send_all(data[sent : sent + size])
                sent += size
            if part.end == "eof":
                await stream.send_eof()
        except trio.BrokenResourceError:
            end = "reset"  # which Linux tells once
        if part.end == "reset":
            await reset(stream)

    async def receive() -> None:
        nonlocal end
        try:
            while data := await stream.receive_some(part.reads):
                got.extend(data)
            end = end or "eof"
        except trio.BrokenResourceError:
            end = "reset"
        except trio.ClosedResourceError:
            end = "left"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(receive)
    return Seen(bytes(got), end)


async def play_both(
    connect: Callable[[], Awaitable[Pair]], client: Part, server: Part
) -> tuple[Seen, Seen]:
    ends = await connect()
    seen: dict[int, Seen] = {}

    async def one(who: int, part: Part) -> None:
        seen[who] = await play(ends[who], who, part)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, 0, client)
        nursery.start_soon(one, 1, server)
    for end in ends:
        await trio.aclose_forcefully(end)
    return seen[0], seen[1]


@settings(max_examples=40, deadline=None)
@given(parts, parts)
async def test_in_any_chunking_each_end_reads_what_the_model_reads(
    client: Part, server: Part
) -> None:
    async with open_tunnel() as tunnel:
        relayed = await play_both(tunnel.connect, client, server)
    assert relayed == await play_both(tcp_pair, client, server)


@settings(max_examples=25, deadline=None)
@given(parts, parts, st.booleans())
async def test_a_reset_reaches_the_other_end_as_in_the_model(
    resetting: Part, other: Part, by_client: bool
) -> None:
    resetting = attrs.evolve(resetting, end="reset")
    other = attrs.evolve(other, end="open")
    order = (resetting, other) if by_client else (other, resetting)
    for connect in (None, tcp_pair):
        async with open_tunnel() as tunnel:
            both = await play_both(connect or tunnel.connect, *order)
        left, told = both if by_client else both[::-1]
        assert (left.end, told.end) == ("left", "reset")
        sent = content(0 if by_client else 1, sum(resetting.chunks))[: sum(resetting.chunks)]
        assert sent.startswith(told.data)


# --- ends ---


async def test_a_half_close_leaves_the_other_half() -> None:
    async with open_tunnel() as tunnel:
        client, server = await tunnel.connect()
        await client.send_all(b"question")
        await client.send_eof()
        assert await read_all(server) == b"question"
        for _ in range(3):
            await server.send_all(b"answer")
            assert await client.receive_some() == b"answer"
        await server.aclose()
        assert await read_all(client) == b""
        await client.aclose()


async def test_a_guest_that_is_reset_after_its_end_of_data_resets_an_end_that_is_silent() -> None:
    async with open_tunnel() as tunnel:
        client, host_side = await tcp_pair()
        host_end, guest_end = await tunnel.vsock_pair()
        tunnel.nursery.start_soon(relay, host_end, host_side)
        await guest_end.send_all(b"the end")
        await guest_end.send_eof()
        assert await read_all(client) == b"the end"
        guest_end.abort()
        async with client:
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(PATIENCE):
                while True:
                    await client.send_all(b"x")


async def test_what_was_sent_just_before_a_close_arrives() -> None:
    async with open_tunnel() as tunnel:
        client, server = await tunnel.connect()
        async with trio.open_nursery() as nursery:

            async def send_and_leave() -> None:
                await client.send_all(BIG)
                await client.aclose()

            nursery.start_soon(send_and_leave)
            assert await read_all(server) == BIG
        await server.aclose()


async def test_an_end_that_takes_no_more_still_gives_what_it_had_to_say() -> None:
    one, relayed_one = trio.testing.memory_stream_pair()
    other, relayed_other = trio.testing.memory_stream_pair()
    relayed_other.send_stream.send_all_hook = _refuse
    await other.send_all(b"an early answer")
    await other.send_eof()
    await one.send_all(b"more than anybody wants")
    await relay(relayed_one, relayed_other)
    assert await one.receive_some() == b"an early answer"


async def _refuse() -> None:
    raise trio.BrokenResourceError("no more")


async def test_early_data_goes_first() -> None:
    async with open_tunnel() as tunnel:
        client, host_side = await tcp_pair()
        host_end, guest_end = await tunnel.vsock_pair()
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                await relay(host_side, host_end, early=b"early, ")
                nursery.cancel_scope.cancel()

            nursery.start_soon(run)
            await client.send_all(b"late")
            await client.aclose()
            assert await read_all(guest_end) == b"early, late"
            await guest_end.aclose()


@pytest.mark.parametrize("full", [False, True])
async def test_cancelled_it_resets_both_ends(full: bool) -> None:
    async with open_tunnel() as tunnel:
        client, host_side = await tcp_pair()
        host_end, guest_end = await tunnel.vsock_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay, host_side, host_end)
            if full:
                await clogged(client)
                await clogged(guest_end)
            else:
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        for end in (client, guest_end):
            with pytest.raises(trio.BrokenResourceError):
                await read_all(end)
            await end.aclose()
        assert host_side.socket.fileno() == -1


async def test_a_relay_that_is_cancelled_before_it_runs_closes_both() -> None:
    client, host_side = await tcp_pair()
    guest_end, other = await tcp_pair()
    with trio.CancelScope() as scope:
        scope.cancel()
        await relay(host_side, other)
    for stream in (client, guest_end):
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        await stream.aclose()
    assert host_side.socket.fileno() == other.socket.fileno() == -1


async def test_an_end_that_does_not_read_holds_the_other_back() -> None:
    async with open_tunnel() as tunnel:
        client, server = await tunnel.connect()
        total = 0
        async with trio.open_nursery() as nursery:

            async def send_forever() -> None:
                nonlocal total
                while True:
                    await client.send_all(bytes(1 << 16))
                    total += 1 << 16

            nursery.start_soon(send_forever)
            last = -1
            while total != last:
                last = total
                await trio.sleep(0.2)
            nursery.cancel_scope.cancel()
        assert total < 64 << 20  # what kernels buffer, four times, and a window
        await client.aclose()
        await server.aclose()


async def test_reset_of_what_is_closed_is_nothing() -> None:
    for stream in await tcp_pair():
        await reset(stream)
        await reset(stream)
