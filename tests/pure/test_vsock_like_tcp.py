"""How a connection ends, packet by packet, that stands in for one of TCP."""

from __future__ import annotations

import pytest

from trio_supermachine.vsock.connection import WINDOW, Connection, State
from trio_supermachine.vsock.muxer import Mux
from trio_supermachine.vsock.packet import Op, Packet, PacketDecoder, Shutdown

PORT = 1030
BOTH = Shutdown.NO_RECEIVE | Shutdown.NO_SEND


def said(mux: Mux) -> list[tuple[Op, int]]:
    """Kinds and flags of all that the muxer wants to send."""
    wire = b""
    while mux.has_output:
        wire += b"".join(mux.pull(1 << 20))
    mux.drained.clear()
    return [(packet.op, packet.flags) for packet in PacketDecoder().feed(wire)]


def hear(mux: Mux, op: Op, flags: int = 0, payload: bytes = b"", window: int = WINDOW) -> None:
    mux.receive(Packet(3, 2, 9, PORT, op, flags, window, 0, payload))


@pytest.fixture
def host() -> Mux:
    mux = Mux()
    mux.listen(PORT, 64)
    return mux


@pytest.fixture
def connection(host: Mux) -> Connection:
    connection = host.receive(Packet(3, 2, 9, PORT, Op.REQUEST, 0, WINDOW, 0, b""))
    assert connection is not None
    assert said(host) == [(Op.RESPONSE, 0)]
    connection.like_tcp = True
    return connection


def test_to_close_is_to_end_sending_and_to_wait_for_the_other_end(
    host: Mux, connection: Connection
) -> None:
    host.close(connection)
    assert said(host) == [(Op.SHUTDOWN, Shutdown.NO_SEND)]
    hear(host, Op.SHUTDOWN, Shutdown.NO_SEND)
    assert said(host) == [(Op.RST, 0)]
    assert connection.state is State.GONE


def test_to_close_after_the_other_end_is_the_end(host: Mux, connection: Connection) -> None:
    hear(host, Op.SHUTDOWN, Shutdown.NO_SEND)
    assert said(host) == []
    host.close(connection)
    assert said(host) == [(Op.SHUTDOWN, Shutdown.NO_SEND), (Op.RST, 0)]
    assert connection.state is State.GONE


def test_an_end_that_was_told_is_not_told_again(host: Mux, connection: Connection) -> None:
    host.end_sending(connection)
    assert said(host) == [(Op.SHUTDOWN, Shutdown.NO_SEND)]
    host.close(connection)
    assert said(host) == []


def test_an_end_follows_what_is_pending(host: Mux, connection: Connection) -> None:
    hear(host, Op.CREDIT_UPDATE, window=0)
    host.offer(connection, memoryview(b"last words"))
    host.end_sending(connection)
    assert said(host) == []
    hear(host, Op.CREDIT_UPDATE)
    assert said(host) == [(Op.RW, 0), (Op.SHUTDOWN, Shutdown.NO_SEND)]


def test_an_end_that_waited_for_what_is_given_up_is_told_by_closing(
    host: Mux, connection: Connection
) -> None:
    hear(host, Op.CREDIT_UPDATE, window=0)
    host.offer(connection, memoryview(b"never"))
    host.end_sending(connection)
    host.close(connection)
    assert said(host) == [(Op.SHUTDOWN, Shutdown.NO_SEND)]


def test_who_has_closed_resets_what_is_sent_after_that(host: Mux, connection: Connection) -> None:
    host.close(connection)
    said(host)
    hear(host, Op.RW, payload=b"for nobody")
    assert said(host) == [(Op.RST, 0)]
    assert connection.state is State.GONE


@pytest.mark.parametrize("ended", [False, True])
def test_to_close_without_having_ended_is_a_reset_after_what_was_said(
    host: Mux, connection: Connection, ended: bool
) -> None:
    hear(host, Op.RW, payload=b"said")
    if ended:
        hear(host, Op.SHUTDOWN, Shutdown.NO_SEND)
    hear(host, Op.SHUTDOWN, BOTH)
    assert said(host) == [(Op.RST, 0)]
    assert connection.state is State.GONE
    assert connection.peer_ended_sending is ended
    assert host.read(connection, None) == b"said"
