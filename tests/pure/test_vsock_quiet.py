"""The silence round a capture: in it no packet, nor a part of one, is under way."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from trio_supermachine.vsock.carrier import SocketCarrier
from trio_supermachine.vsock.connection import Connection
from trio_supermachine.vsock.framing import Framing
from trio_supermachine.vsock.muxer import Mux
from trio_supermachine.vsock.packet import (
    HEADER_SIZE,
    Op,
    Packet,
    PacketDecoder,
    VsockProtocolError,
)
from trio_supermachine.vsock.stream import VsockMux

CARRIER_OPS = {Op.FREEZE, Op.FROZEN, Op.THAW, Op.RESET}


class Silence(RuleBasedStateMachine):
    """A host that falls silent and goes on at random, beside a guest that insists on the order."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Mux()
        self.host.listen(1029, 64)
        self.framing = Framing(self.host)
        self.guest_is_quiet = False
        self.to_guest: list[Packet] = []
        self.dialed: list[Connection] = []
        self.wanted = False
        self.next_port = 1

    def say(self, packet: Packet) -> None:
        for _ in self.framing.receive(packet.encode()):
            pass

    @rule()
    def dial(self) -> None:
        self.dialed.append(self.host.dial(1028))

    @rule()
    def guest_dials(self) -> None:
        if not self.guest_is_quiet:
            self.say(Packet(3, 2, self.next_port, 1029, Op.REQUEST, buf_alloc=1000))
            self.next_port += 1

    @precondition(lambda self: not self.wanted)
    @rule()
    def freeze(self) -> None:
        self.framing.freeze()
        self.wanted = True

    @precondition(lambda self: self.wanted)
    @rule()
    def thaw(self) -> None:
        self.framing.thaw()
        self.wanted = False

    @rule(size=st.sampled_from([1, 1 << 20]))
    def send(self, size: int) -> None:
        if self.framing.has_output:
            data = b"".join(bytes(part) for part in self.framing.pull(size))
            self.to_guest += PacketDecoder().feed(data)

    @precondition(lambda self: self.to_guest)
    @rule()
    def guest_takes_one(self) -> None:
        packet = self.to_guest.pop(0)
        if self.guest_is_quiet:
            assert packet.op is Op.THAW
            self.guest_is_quiet = False
        elif packet.op is Op.FREEZE:
            assert not self.to_guest, "the host spoke before the guest was silent"
            self.guest_is_quiet = True
            self.say(Packet(3, 2, 0, 0, Op.FROZEN))
        else:
            assert packet.op not in CARRIER_OPS
            if packet.op is Op.REQUEST:
                answer = Packet(3, 2, packet.dst_port, packet.src_port, Op.RESPONSE, buf_alloc=9)
                self.say(answer)

    def teardown(self) -> None:
        if self.wanted:
            self.framing.thaw()
        while self.framing.has_output or self.to_guest:
            self.wanted = False
            self.send(1 << 20)
            while self.to_guest:
                self.guest_takes_one()
        assert not self.guest_is_quiet
        assert all(connection.state.value == "open" for connection in self.dialed)


TestSilence = Silence.TestCase


@pytest.mark.parametrize("op", sorted(CARRIER_OPS))
def test_what_no_guest_says_ends_the_carrier(op: Op) -> None:
    with pytest.raises(VsockProtocolError, match=op.name):
        list(Framing(Mux()).receive(Packet(3, 2, 0, 0, op).encode()))


def test_being_silent_is_confirmed_once() -> None:
    framing = Framing(Mux())
    framing.freeze()
    confirmed = Packet(3, 2, 0, 0, Op.FROZEN).encode()
    assert list(framing.receive(confirmed)) == [None]
    assert framing.still
    with pytest.raises(VsockProtocolError, match="FROZEN"):
        list(framing.receive(confirmed))


async def receive(peer: trio.SocketStream) -> Op:
    data = b""
    while len(data) < HEADER_SIZE:
        data += await peer.receive_some(HEADER_SIZE - len(data))
    (packet,) = PacketDecoder().feed(data)
    return packet.op


async def test_a_quiet_block_begins_when_the_guest_is_silent_and_ends_with_thaw() -> None:
    left, right = socket.socketpair()
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(right))
    host = VsockMux(SocketCarrier(left))
    host.reset_peer()
    async with peer, trio.open_nursery() as nursery:
        nursery.start_soon(host.run)
        assert await receive(peer) is Op.RESET
        entered = trio.Event()

        async def be_quiet() -> None:
            async with host.quiet():
                entered.set()

        nursery.start_soon(be_quiet)
        assert await receive(peer) is Op.FREEZE
        await trio.testing.wait_all_tasks_blocked()
        assert not entered.is_set()
        await peer.send_all(Packet(3, 2, 0, 0, Op.FROZEN).encode())
        assert await receive(peer) is Op.THAW
        assert entered.is_set()
        host.close()


async def test_a_cancelled_wait_thaws_when_the_guest_has_come_to_rest() -> None:
    left, right = socket.socketpair()
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(right))
    host = VsockMux(SocketCarrier(left))
    async with peer, trio.open_nursery() as nursery:
        nursery.start_soon(host.run)
        with trio.move_on_after(0.01):
            async with host.quiet():
                pytest.fail("nobody has confirmed it")
        assert await receive(peer) is Op.FREEZE
        await peer.send_all(Packet(3, 2, 0, 0, Op.FROZEN).encode())
        assert await receive(peer) is Op.THAW
        host.close()


async def test_a_carrier_that_ends_ends_the_wait() -> None:
    left, right = socket.socketpair()
    host = VsockMux(SocketCarrier(left))
    with right:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.run)
            nursery.start_soon(_close_soon, host)
            with pytest.raises(trio.BrokenResourceError):
                async with host.quiet():
                    pytest.fail("nobody has confirmed it")


async def _close_soon(host: VsockMux) -> None:
    await trio.testing.wait_all_tasks_blocked()
    host.close()
