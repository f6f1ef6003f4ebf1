"""Streams over two muxers, back to back on a socket pair or in memory, keep Trio's promises."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import attrs
import pytest
import trio
import trio.testing

from trio_supermachine.vsock.carrier import Carrier, SocketCarrier
from trio_supermachine.vsock.connection import OPENING, WINDOW
from trio_supermachine.vsock.memory import Line
from trio_supermachine.vsock.packet import Op, Packet, VsockProtocolError
from trio_supermachine.vsock.stream import VsockListener, VsockMux, VsockStream

from ..support.vsock_ends import DATA, exchange, read_all

PORT = 1028


@attrs.frozen
class Ends:
    """A host and a guest that listens on :data:`PORT`."""

    host: VsockMux
    guest: VsockMux
    listener: VsockListener

    async def connect(self) -> tuple[VsockStream, VsockStream]:
        dialed = await self.host.dial(PORT)
        return dialed, await self.listener.accept()

    async def clogged(self) -> tuple[VsockStream, VsockStream]:
        """A pair that takes no more data in either direction."""
        pair = await self.connect()
        for stream in pair:
            await stream.send_all(bytes(WINDOW))
        return pair


@pytest.fixture(params=["socket", "memory"])
async def ends(request: pytest.FixtureRequest, nursery: trio.Nursery) -> AsyncIterator[Ends]:
    carriers: tuple[Carrier, Carrier] = Line().ends
    if request.param == "socket":
        left, right = socket.socketpair()
        carriers = SocketCarrier(left), SocketCarrier(right)
    host = VsockMux(carriers[0])
    guest = VsockMux(carriers[1], local_cid=3, peer_cid=2, max_payload=32724)
    nursery.start_soon(host.run)
    nursery.start_soon(guest.run)
    yield Ends(host, guest, guest.listen(PORT))
    host.close()
    guest.close()


async def test_they_pass_trios_own_checks(ends: Ends) -> None:
    await trio.testing.check_half_closeable_stream(ends.connect, ends.clogged)


async def test_closed_pairs_leave_nothing_behind(ends: Ends) -> None:
    for _ in range(50):
        one, two = await ends.connect()
        await one.aclose()
        await two.aclose()
    await trio.testing.wait_all_tasks_blocked()
    for mux in (ends.host, ends.guest):
        assert not mux.core._connections
        assert not mux.core._closing
        assert not mux._streams


async def test_data_sent_just_before_a_close_arrives(ends: Ends) -> None:
    one, two = await ends.connect()
    async with trio.open_nursery() as nursery:

        async def send_and_leave() -> None:
            await one.send_all(DATA)
            await one.aclose()

        nursery.start_soon(send_and_leave)
        assert await read_all(two) == DATA


async def test_data_that_nobody_has_accepted_yet_survives_its_senders_leave(ends: Ends) -> None:
    one = await ends.host.dial(PORT)
    await one.send_all(b"left early")
    await one.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert await read_all(await ends.listener.accept()) == b"left early"


async def test_half_closes_leave_the_other_half(ends: Ends) -> None:
    one, two = await ends.connect()
    await one.send_eof()
    assert await two.receive_some() == b""
    await two.send_all(b"answer")
    await two.send_eof()
    assert await read_all(one) == b"answer"
    assert await read_all(one) == b""


async def test_both_ends_at_full_speed_at_once(ends: Ends) -> None:
    await exchange(*await ends.connect())


async def test_one_clogged_stream_does_not_stop_the_others(ends: Ends) -> None:
    await ends.clogged()
    one, two = await ends.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, DATA)
        left = len(DATA)
        while left:
            left -= len(await two.receive_some())


async def test_a_sender_is_held_back_by_a_receiver_that_does_not_read(ends: Ends) -> None:
    one, two = await ends.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, DATA)
        await trio.testing.wait_all_tasks_blocked()
        assert two._connection.buffered == WINDOW
        nursery.cancel_scope.cancel()


async def test_an_abort_breaks_the_peer(ends: Ends) -> None:
    one, two = await ends.connect()
    one.abort()
    with pytest.raises(trio.BrokenResourceError):
        await two.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await two.send_all(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await one.receive_some()


async def test_a_port_without_listener_refuses(ends: Ends) -> None:
    with pytest.raises(ConnectionRefusedError, match="port 7"):
        await ends.host.dial(7)


@pytest.mark.parametrize("size", [1, OPENING, OPENING + 1, len(DATA)])
async def test_a_dial_with_an_opening_waits_for_nothing(ends: Ends, size: int) -> None:
    with trio.CancelScope() as scope:
        dialed = await ends.host.dial(PORT, DATA[:size])
        scope.cancel()
        await trio.lowlevel.checkpoint()
    async with dialed, await ends.listener.accept() as accepted, trio.open_nursery() as nursery:
        nursery.start_soon(dialed.send_all, b"more")
        nursery.start_soon(accepted.send_all, b"answer")
        got = b""
        while len(got) < size + 4:
            got += await accepted.receive_some()
        assert got == DATA[:size] + b"more"
        assert await dialed.receive_some() == b"answer"


async def test_the_end_of_data_follows_an_opening(ends: Ends) -> None:
    dialed = await ends.host.dial(PORT, b"all")
    await dialed.send_eof()
    async with dialed, await ends.listener.accept() as accepted:
        assert [chunk async for chunk in accepted] == [b"all"]


async def test_a_dial_that_fails_lets_others_run(ends: Ends) -> None:
    async with trio.open_nursery() as nursery:
        ends.host.close()
        ran = False

        @nursery.start_soon
        async def run() -> None:
            nonlocal ran
            ran = True

        while not ran:
            with pytest.raises(trio.BrokenResourceError):
                await ends.host.dial(PORT)


async def test_a_refusal_breaks_a_stream_that_was_dialed_with_an_opening(ends: Ends) -> None:
    dialed = await ends.host.dial(PORT + 1, b"hello?")
    with pytest.raises(trio.BrokenResourceError):
        await dialed.receive_some()
    await dialed.aclose()
    await trio.testing.wait_all_tasks_blocked()
    for mux in (ends.host, ends.guest):
        assert not mux.core._connections
        assert not mux._streams


async def test_a_port_has_one_listener_until_it_is_closed(ends: Ends) -> None:
    with pytest.raises(OSError, match="listener") as caught:
        ends.guest.listen(PORT)
    assert caught.value.errno == errno.EADDRINUSE
    await ends.listener.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await ends.listener.accept()
    with pytest.raises(ConnectionRefusedError):
        await ends.host.dial(PORT)
    ends.guest.listen(PORT)
    await ends.host.dial(PORT)


async def test_a_full_backlog_refuses_and_accepting_makes_room(ends: Ends) -> None:
    listener = ends.guest.listen(5, backlog=1)
    await ends.host.dial(5)
    with pytest.raises(ConnectionRefusedError):
        await ends.host.dial(5)
    await listener.accept()
    await ends.host.dial(5)


async def test_a_cancelled_receive_loses_nothing(ends: Ends) -> None:
    one, two = await ends.connect()
    got = b""
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for at in range(0, 20_000, 100):
                await one.send_all(DATA[at : at + 100])
            await one.aclose()

        nursery.start_soon(send)
        ended = False
        while not ended:
            with trio.CancelScope() as scope:
                nursery.start_soon(_cancel_soon, scope)
                while True:
                    chunk = await two.receive_some(77)
                    got += chunk
                    if not chunk:
                        ended = True
                        break
    assert got == DATA[:20_000]


async def _cancel_soon(scope: trio.CancelScope) -> None:
    await trio.lowlevel.checkpoint()
    scope.cancel()


async def test_a_cancelled_send_has_sent_a_prefix_and_the_stream_goes_on(ends: Ends) -> None:
    one, two = await ends.connect()
    mutable = bytearray(DATA)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, mutable)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    mutable[:] = b"\xff" * len(mutable)
    mutable.clear()  # nothing holds a view of it
    await trio.testing.wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, b"the end")
        got = b""
        while not got.endswith(b"the end"):
            got += await two.receive_some()
    prefix = got.removesuffix(b"the end")
    assert DATA.startswith(prefix)
    assert len(prefix) >= WINDOW


async def test_what_waits_for_the_carrier_does_not_change_with_its_senders_buffer(
    ends: Ends,
) -> None:
    one, two = await ends.connect()
    data = bytearray(WINDOW)  # more than a socket takes at once
    await one.send_all(data)
    data[:] = b"\xff" * WINDOW
    await one.send_eof()
    assert await read_all(two) == bytes(WINDOW)


async def test_a_cancelled_dial_leaves_no_connection(ends: Ends) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await ends.host.dial(PORT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends.host.dial, PORT)
        await _turn()
        nursery.cancel_scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert not ends.host.core._connections
    assert not ends.guest.core._connections
    one, two = await ends.connect()
    await one.send_all(b"x")
    assert await two.receive_some() == b"x"


async def _turn() -> None:
    await trio.lowlevel.checkpoint()


async def test_a_cancelled_accept_takes_no_connection(ends: Ends) -> None:
    one = await ends.host.dial(PORT)
    with trio.CancelScope() as scope:
        scope.cancel()
        await ends.listener.accept()
    await one.send_all(b"x")
    assert await (await ends.listener.accept()).receive_some() == b"x"


async def test_every_acceptor_gets_its_own_connection(ends: Ends) -> None:
    got: list[VsockStream] = []

    async def accept() -> None:
        got.append(await ends.listener.accept())

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            await ends.host.dial(PORT)
    assert len({stream._connection.peer_port for stream in got}) == 5


async def test_closing_wakes_every_waiter_with_the_right_error(ends: Ends) -> None:
    one, _ = await ends.clogged()
    await one.receive_some()
    while one._connection.buffered:
        await one.receive_some()

    async def expect(wait: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, lambda: one.send_all(b"x"))
        nursery.start_soon(expect, one.receive_some)
        nursery.start_soon(expect, ends.listener.accept)
        await trio.testing.wait_all_tasks_blocked()
        await one.aclose()
        await ends.listener.aclose()


async def test_the_carriers_end_breaks_everything_but_what_has_arrived(ends: Ends) -> None:
    one, two = await ends.connect()
    idle, _ = await ends.connect()
    await two.send_all(b"last words")
    await trio.testing.wait_all_tasks_blocked()

    async def expect(wait: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await wait()

    listener = ends.host.listen(5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, idle.receive_some)
        nursery.start_soon(expect, listener.accept)
        await trio.testing.wait_all_tasks_blocked()
        ends.guest.close()
    assert await one.receive_some() == b"last words"
    await expect(one.receive_some)
    await expect(lambda: one.send_all(b"x"))
    await expect(lambda: ends.host.dial(PORT))
    await expect(ends.listener.accept)
    await one.aclose()


async def test_close_can_say_what_dials_and_accepts_raise(ends: Ends) -> None:
    ends.host.close(lambda: LookupError("the machine is gone"))
    with pytest.raises(LookupError, match="gone"):
        await ends.host.dial(PORT)


async def test_run_after_close_returns() -> None:
    left, right = socket.socketpair()
    mux = VsockMux(SocketCarrier(left))
    mux.close()
    await mux.run()
    right.close()


async def test_a_trio_socket_will_do_as_a_carrier(nursery: trio.Nursery) -> None:
    left, right = trio.socket.socketpair()
    host = VsockMux(SocketCarrier(trio.SocketStream(left)))
    guest = VsockMux(SocketCarrier(right), local_cid=3, peer_cid=2)
    nursery.start_soon(host.run)
    nursery.start_soon(guest.run)
    guest.listen(PORT)
    await host.dial(PORT)
    host.close()
    guest.close()


async def _against(hostile: Callable[[trio.SocketStream], Awaitable[None]]) -> str:
    """Run a muxer against a peer that speaks bytes; gives the protocol error that ended it."""
    left, right = trio.socket.socketpair()
    mux = VsockMux(SocketCarrier(left))
    mux.listen(PORT, backlog=4)
    async with trio.open_nursery() as nursery:

        async def speak() -> None:
            async with trio.SocketStream(right) as peer:
                await hostile(peer)

        nursery.start_soon(speak)
        try:
            await mux.run()
        except VsockProtocolError as exc:
            return str(exc)
    return ""


async def test_nonsense_ends_the_carrier_with_a_typed_error() -> None:
    async def hostile(peer: trio.SocketStream) -> None:
        await peer.send_all(b"\xff" * 44)
        await peer.receive_some()

    assert "payload" in await _against(hostile)


async def test_a_wrong_cid_ends_the_carrier_with_a_typed_error() -> None:
    async def hostile(peer: trio.SocketStream) -> None:
        await peer.send_all(Packet(9, 2, 1, PORT, Op.REQUEST).encode())
        await peer.receive_some()

    assert "from CID 9" in await _against(hostile)


async def test_a_peer_that_floods_and_never_reads_is_not_read_any_more() -> None:
    sent = 0

    async def hostile(peer: trio.SocketStream) -> None:
        nonlocal sent
        for start in range(0, 10_000_000, 100):
            flood = b"".join(Packet(3, 2, start + n, 77, Op.REQUEST).encode() for n in range(100))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peer.send_all, flood)
                await trio.testing.wait_all_tasks_blocked()
                blocked = bool(nursery.child_tasks)
                nursery.cancel_scope.cancel()
            if blocked:
                break
            sent += 100

    assert await _against(hostile) == ""
    assert 0 < sent < 100_000


async def test_the_carriers_end_in_the_middle_of_a_packet_is_an_end() -> None:
    async def hostile(peer: trio.SocketStream) -> None:
        await peer.send_all(Packet(3, 2, 1, PORT, Op.REQUEST).encode()[:20])

    assert await _against(hostile) == ""


async def test_an_answer_to_a_peer_that_has_left_is_an_end() -> None:
    left, right = socket.socketpair()
    mux = VsockMux(SocketCarrier(left))
    # Nobody listens there, so it is answered by a reset, which finds the socket broken.
    right.send(Packet(3, 2, 5000, 999, Op.REQUEST).encode())
    right.close()
    await mux.run()


async def test_a_watcher_takes_what_comes_until_the_end_without_a_task(ends: Ends) -> None:
    watched, peer = await ends.connect()
    taken = bytearray()
    over = trio.Event()

    def changed() -> None:
        while data := watched.take():
            taken.extend(data)
        if watched.ended:
            over.set()

    await peer.send_all(b"before ")
    watched.watch(changed)
    await peer.send_all(DATA)
    await peer.aclose()
    await over.wait()
    assert taken == b"before " + DATA
    assert not watched.take()
    assert not watched.sendable()
    watched.leave()


async def test_send_nowait_takes_one_thing_at_a_time_and_the_watcher_hears_of_room(
    ends: Ends,
) -> None:
    watched, peer = await ends.connect()
    news = trio.Event()
    watched.watch(lambda: news.set())
    watched.send_nowait(DATA)
    assert not watched.sendable()
    with pytest.raises(trio.WouldBlock):
        watched.send_nowait(b"more")
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            while not watched.sendable():
                nonlocal news
                news = trio.Event()
                await news.wait()
            watched.send_nowait(b"more")
            await watched.send_eof()

        assert await read_all(peer) == DATA + b"more"
    watched.abort()


async def test_a_stream_left_without_a_word_is_gone_when_its_peer_closes(ends: Ends) -> None:
    dialed, accepted = await ends.connect()
    dialed.leave()
    dialed.leave()
    with pytest.raises(trio.ClosedResourceError):
        await dialed.receive_some()
    await _turn()
    assert ends.host.core._connections
    await accepted.aclose()
    while ends.host.core._connections or ends.guest.core._connections:
        await _turn()


@pytest.mark.parametrize("end", ["abort", "carrier"])
async def test_watchers_may_leave_while_they_are_called(ends: Ends, end: str) -> None:
    pairs = [await ends.connect() for _ in range(3)]
    called = []
    gone = trio.Event()
    for stream, _ in pairs:

        def changed(stream: VsockStream = stream) -> None:
            if stream.ended:
                called.append(stream)
                for other, _ in pairs:
                    other.abort()
                gone.set()

        stream.watch(changed)
    if end == "abort":
        pairs[1][1].abort()
    else:
        ends.host.close()
    await gone.wait()
    assert len(called) == 1
    with pytest.raises(trio.ClosedResourceError):
        await pairs[0][0].receive_some()
