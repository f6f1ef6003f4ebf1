"""The muxer without I/O: against a model of plain pipes, and against hostile peers."""

from __future__ import annotations

import errno

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trio_supermachine.vsock import muxer
from trio_supermachine.vsock.connection import OPENING, WINDOW, Connection, State
from trio_supermachine.vsock.framing import Framing
from trio_supermachine.vsock.muxer import MAX_CONNECTIONS, MAX_CONTROL, Mux
from trio_supermachine.vsock.packet import MAX_PAYLOAD, Op, Packet, PacketDecoder, Shutdown

PORT = 1028


def packets(mux: Mux) -> list[Packet]:
    """All that the muxer wants to send."""
    wire = b""
    while mux.has_output:
        wire += b"".join(mux.pull(1 << 20))
    mux.drained.clear()
    return list(PacketDecoder().feed(wire))


def from_guest(
    op: Op, *, port: int = 9, to: int = PORT, window: int = WINDOW, **rest: object
) -> Packet:
    return Packet(3, 2, port, to, op, buf_alloc=window, **rest)  # type: ignore[arg-type]


def ops(sent: list[Packet]) -> list[Op]:
    return [packet.op for packet in sent]


def accepted(mux: Mux, port: int = 9) -> Connection:
    """A connection that a guest has opened to a host that listens."""
    connection = mux.receive(from_guest(Op.REQUEST, port=port))
    assert connection is not None
    assert ops(packets(mux)) == [Op.RESPONSE]
    return connection


@pytest.fixture
def host() -> Mux:
    mux = Mux()
    mux.listen(PORT, 64)
    return mux


class Pipes(RuleBasedStateMachine):
    """Two muxers over two lossless wires behave like pairs of plain pipes.

    Each direction's model is the bytes written, in order, and whether its writer has ended.
    """

    ends = st.integers(0, 1)
    sizes = st.sampled_from([1, 7, 4095, 4096, 65536, 65537, 150_000, 300_000])

    def __init__(self) -> None:
        super().__init__()
        self.muxes = [Mux(), Mux(local_cid=3, peer_cid=2, max_payload=32724)]
        self.listening = [mux.listen(PORT, 64) for mux in self.muxes]
        self.wires = [bytearray(), bytearray()]  # what each end has sent
        self.framings = [Framing(mux) for mux in self.muxes]
        self.pairs: list[list[Connection]] = []
        self.dialing: list[tuple[int, Connection]] = []
        self.written: dict[Connection, bytearray] = {}
        self.read: dict[Connection, bytearray] = {}
        self.spoiled: set[int] = set()  # pairs with an abort: content may be cut short
        self.left: set[Connection] = set()
        self.stamp = 0

    def peer(self, connection: Connection) -> Connection:
        pair = next(pair for pair in self.pairs if connection in pair)
        return pair[1 - pair.index(connection)]

    def pick(self, data: st.DataObject) -> tuple[int, Connection]:
        index = data.draw(st.integers(0, len(self.pairs) - 1))
        end = data.draw(self.ends)
        return end, self.pairs[index][end]

    @precondition(lambda self: len(self.pairs) + len(self.dialing) < 4)
    @rule(end=ends, opening=st.just(0) | sizes)
    def dial(self, end: int, opening: int) -> None:
        connection = self.muxes[end].dial(PORT)
        self.dialing.append((end, connection))
        self.written[connection] = bytearray()
        if opening:
            self.write(end, connection, opening)

    def write(self, end: int, connection: Connection, size: int) -> None:
        self.stamp += 1
        chunk = (self.stamp.to_bytes(4, "big") * (size // 4 + 1))[:size]
        self.written[connection] += chunk
        self.muxes[end].offer(connection, memoryview(chunk))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), size=sizes)
    def send(self, data: st.DataObject, size: int) -> None:
        end, connection = self.pick(data)
        if (
            connection.state is not State.OPEN
            or connection.ended_sending
            or connection.pending is not None
        ):
            return
        self.write(end, connection, size)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), limit=st.sampled_from([None, 1, 5000, 100_000]))
    def receive(self, data: st.DataObject, limit: int | None) -> None:
        end, connection = self.pick(data)
        if connection not in self.left:
            got = self.muxes[end].read(connection, limit)
            assert limit is None or len(got) <= limit
            self.read[connection] += got

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def end_sending(self, data: st.DataObject) -> None:
        end, connection = self.pick(data)
        if (
            connection.state is not State.DIALING  # nobody holds its stream yet
            and connection.pending is None
            and connection not in self.left
        ):
            self.muxes[end].end_sending(connection)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), kind=st.sampled_from(["close", "abort"]))
    def leave(self, data: st.DataObject, kind: str) -> None:
        end, connection = self.pick(data)
        if connection in self.left:
            return
        pair = next(i for i, pair in enumerate(self.pairs) if connection in pair)
        if kind == "abort" or connection.pending is not None or not connection.peer_ended_sending:
            self.spoiled.add(pair)
        self.left.add(connection)
        getattr(self.muxes[end], kind)(connection)

    @rule(end=ends, budget=st.sampled_from([1, 50_000, 1_000_000]))
    def pack(self, end: int, budget: int) -> None:
        if len(self.wires[end]) < 2_000_000:
            self.wires[end] += b"".join(self.framings[end].pull(budget))
            self.muxes[end].drained.clear()

    @rule(end=ends, size=st.sampled_from([1, 43, 44, 5000, 70_000, 1_000_000]))
    def carry(self, end: int, size: int) -> None:
        wire = self.wires[1 - end]
        piece, wire[:size] = bytes(wire[:size]), b""
        for _ in self.framings[end].receive(piece):
            pass
        backlog = self.listening[end].backlog
        while backlog:
            connection = backlog.popleft()
            dialed = next(
                dialed
                for dialer, dialed in self.dialing
                if dialer != end and dialed.local_port == connection.peer_port
            )
            self.dialing.remove((1 - end, dialed))
            self.pairs.append([connection, dialed] if end == 0 else [dialed, connection])
            self.written[connection] = bytearray()
            self.read[connection] = bytearray()
            self.read[dialed] = bytearray()

    @invariant()
    def what_is_read_is_what_was_written_in_order(self) -> None:
        for pair in self.pairs:
            for connection in pair:
                written = self.written[self.peer(connection)]
                assert written.startswith(self.read[connection])
                assert connection.buffered <= WINDOW

    def teardown(self) -> None:
        """Carry everything over, reading all: then nothing is missing and nothing left."""
        for _ in range(200):
            for end in (0, 1):
                self.pack(end, 1_000_000)
                self.carry(1 - end, 10_000_000)
            for pair in self.pairs:
                for end, connection in enumerate(pair):
                    if connection not in self.left:
                        while chunk := self.muxes[end].read(connection, None):
                            self.read[connection] += chunk
            if not any(self.wires) and not any(mux.has_output for mux in self.muxes):
                break
        self.what_is_read_is_what_was_written_in_order()
        for index, pair in enumerate(self.pairs):
            if index in self.spoiled:
                assert all(one.state is State.GONE for one in pair if self.peer(one) in self.left)
                continue
            for connection in pair:
                other = self.peer(connection)
                if connection not in self.left:
                    assert self.read[connection] == self.written[other]
                    assert connection.peer_ended_sending is other.ended_sending
            if all(one.ended_sending for one in pair):
                assert all(one.state is State.GONE for one in pair)


Pipes.TestCase.settings = settings(max_examples=150, stateful_step_count=80, deadline=None)
TestTwoMuxersAreLikePipes = Pipes.TestCase


def test_senders_take_turns(host: Mux) -> None:
    greedy, modest = accepted(host, 9), accepted(host, 10)
    host.offer(greedy, memoryview(bytes(WINDOW)))
    host.offer(modest, memoryview(b"hello"))
    assert [p.dst_port for p in packets(host)] == [9, 10] + [9] * (WINDOW // MAX_PAYLOAD - 1)


def test_a_payload_is_no_larger_than_the_room_that_there_is(host: Mux) -> None:
    connection = accepted(host)
    host.offer(connection, memoryview(b"0123456789"))
    pulled = []
    while host.has_output:
        pulled.append(bytes(host.pull(4)[1]))
    assert pulled == [b"0123", b"4567", b"89"]
    assert host.drained == [connection]


def test_what_opens_a_connection_goes_behind_its_request_as_far_as_any_window_goes() -> None:
    mux = Mux()
    connection = mux.dial(PORT)
    mux.offer(connection, memoryview(bytes(OPENING + 1)))
    request, data = packets(mux)
    assert (request.op, data.op, len(data.payload)) == (Op.REQUEST, Op.RW, OPENING)
    answer = Packet(3, 2, PORT, connection.local_port, Op.RESPONSE, buf_alloc=WINDOW)
    assert mux.receive(answer) is connection
    assert [len(p.payload) for p in packets(mux)] == [1]


def test_a_refused_connection_forgets_what_should_open_it() -> None:
    mux = Mux()
    connection = mux.dial(PORT)
    mux.offer(connection, memoryview(bytes(OPENING + 1)))
    packets(mux)
    assert mux.receive(Packet(3, 2, PORT, connection.local_port, Op.RST)) is connection
    assert connection.state is State.GONE
    assert not packets(mux)


def test_data_waits_for_credit_and_goes_on_with_it(host: Mux) -> None:
    connection = host.receive(from_guest(Op.REQUEST, window=10))
    assert connection is not None
    host.offer(connection, memoryview(b"0123456789abc"))
    assert [bytes(p.payload) for p in packets(host)] == [b"", b"0123456789"]
    host.receive(from_guest(Op.CREDIT_UPDATE, window=10, fwd_cnt=2))
    assert [bytes(p.payload) for p in packets(host)] == [b"ab"]
    host.receive(from_guest(Op.CREDIT_UPDATE, window=10, fwd_cnt=12))
    assert [bytes(p.payload) for p in packets(host)] == [b"c"]


def test_a_slow_reader_announces_credit_in_large_steps_and_a_drained_window_at_once(
    host: Mux,
) -> None:
    connection = accepted(host)
    for _ in range(WINDOW // 4096):
        host.receive(from_guest(Op.RW, payload=bytes(4096)))
    updates = 0
    while host.read(connection, 100):
        updates += len(packets(host))
    assert 2 <= updates <= 4
    # The guest may send a full window less what it was not told of, which is under a half.
    assert connection.forwarded == WINDOW


@pytest.mark.parametrize("own", [4096, WINDOW // 4, WINDOW // 2, WINDOW, 2 * WINDOW])
def test_a_guest_that_sends_no_more_at_once_than_it_takes_is_never_stuck(
    host: Mux, own: int
) -> None:
    """As Linux does, whatever credit it has."""
    connection = host.receive(from_guest(Op.REQUEST, window=own))
    assert connection is not None
    packets(host)
    sent = told = 0
    while sent < 4 * WINDOW:
        room = min(own, WINDOW) - (sent - told)
        assert room > 0
        size = min(room, 4096)
        host.receive(from_guest(Op.RW, window=own, payload=bytes(size)))
        sent += size
        assert host.read(connection, None)
        told = max([told, *(packet.fwd_cnt for packet in packets(host))])


def test_a_window_of_tiny_packets_costs_memory_like_one_of_large_packets(host: Mux) -> None:
    connection = accepted(host)
    for _ in range(20_000):
        host.receive(from_guest(Op.RW, payload=b"xy"))
    assert len(connection._chunks) == 1
    assert connection.buffered == 40_000


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(
            [from_guest(Op.RW, payload=bytes(65536))] * (WINDOW // 65536 + 1),
            id="beyond the credit",
        ),
        pytest.param([from_guest(Op.CREDIT_UPDATE, fwd_cnt=1)], id="credit for nothing"),
        pytest.param([from_guest(Op.REQUEST)], id="request again"),
        pytest.param([from_guest(Op.RESPONSE)], id="response to nothing"),
        pytest.param(
            [from_guest(Op.SHUTDOWN, flags=2), from_guest(Op.RW, payload=b"x")],
            id="data after its end",
        ),
    ],
)
def test_a_peer_that_breaks_the_rules_loses_that_connection_only(
    host: Mux, bad: list[Packet]
) -> None:
    other = accepted(host, 10)
    connection = accepted(host, 9)
    for packet in bad:
        host.receive(packet)
    assert connection.state is State.GONE
    assert connection.buffered == 0
    assert not connection.peer_ended_sending
    assert [(p.op, p.dst_port) for p in packets(host)] == [(Op.RST, 9)]
    assert other.state is State.OPEN


def test_an_older_count_that_arrives_late_is_no_fault(host: Mux) -> None:
    connection = accepted(host)
    host.offer(connection, memoryview(bytes(100)))
    packets(host)
    host.receive(from_guest(Op.CREDIT_UPDATE, fwd_cnt=100))
    host.receive(from_guest(Op.CREDIT_UPDATE, fwd_cnt=40))
    assert connection.state is State.OPEN
    assert connection.credit == WINDOW


def test_counters_wrap_on_the_wire_only() -> None:
    host, guest = Mux(), Mux(local_cid=3, peer_cid=2)
    guest.listen(PORT, 1)
    here = host.dial(PORT)
    for sender, receiver in ((host, guest), (guest, host)):
        for packet in packets(sender):
            receiver.receive(packet)
    there = guest._listening[PORT].backlog.popleft()
    near = 2**32 - 1000
    here._sent = here._peer_forwarded = there._received = there._announced = near
    for _ in range(3):
        host.offer(here, memoryview(bytes(WINDOW)))
        for packet in packets(host):
            guest.receive(packet)
        assert there.buffered == WINDOW
        while guest.read(there, None):
            pass
        for packet in packets(guest):
            host.receive(packet)
    assert here.state is there.state is State.OPEN


@pytest.mark.parametrize(("src", "dst"), [(4, 2), (3, 1), (2, 3), (2**64 - 1, 2**64 - 1)])
def test_packets_of_other_cids_are_reset_and_change_nothing(host: Mux, src: int, dst: int) -> None:
    connection = accepted(host)
    for op in (Op.REQUEST, Op.RST, Op.RW):
        assert host.receive(Packet(src, dst, 9, PORT, op)) is None
    assert connection.state is State.OPEN
    (reset,) = packets(host)
    assert reset == Packet(dst, 3, PORT, 9, Op.RST, payload=reset.payload)


def test_what_is_no_packet_of_a_stream_costs_the_connection_it_names(host: Mux) -> None:
    other, connection = accepted(host, 10), accepted(host, 9)
    assert host.refuse(3, 2, 9, PORT) is connection
    assert host.refuse(3, 2, 11, PORT) is None
    assert host.refuse(4, 2, 10, PORT) is None
    assert [(p.op, p.dst_port) for p in packets(host)] == [
        (Op.RST, 11),
        (Op.RST, 10),
        (Op.RST, 9),
    ]
    assert connection.state is State.GONE
    assert other.state is State.OPEN


def test_a_peer_that_begins_anew_leaves_listeners_and_dials_it_has_not_heard_of(host: Mux) -> None:
    open_ = accepted(host)
    told = host.dial(7)
    packets(host)
    untold = host.dial(7)
    host.receive(from_guest(Op.RW, to=77))
    assert set(host.forget_peer()) == {told, open_}
    assert told.state is open_.state is State.GONE
    assert not host._listening[PORT].backlog
    assert ops(packets(host)) == [Op.REQUEST]
    assert untold.state is State.DIALING
    accepted(host)


def test_ports_go_on_where_another_muxer_left_off() -> None:
    first, second = Mux(), Mux()
    used = [first.dial(7).local_port for _ in range(3)]
    second.next_port = first.next_port
    assert second.dial(7).local_port not in used
    with pytest.raises(ValueError, match="80"):
        second.next_port = 80


def test_stray_packets_are_reset_and_stray_resets_are_not(host: Mux) -> None:
    virtio = [op for op in Op if op < Op.FREEZE]
    for op in virtio:
        host.receive(from_guest(op, port=int(op), to=5))
    sent = packets(host)
    assert set(ops(sent)) == {Op.RST}
    assert {p.dst_port for p in sent} == {int(op) for op in virtio if op is not Op.RST}


def test_requests_beyond_the_backlog_are_refused() -> None:
    host = Mux()
    listening = host.listen(PORT, 2)
    for port in range(5):
        host.receive(from_guest(Op.REQUEST, port=port))
    sent = packets(host)
    assert sorted(ops(sent)) == [Op.RESPONSE] * 2 + [Op.RST] * 3
    listening.backlog.popleft()
    host.receive(from_guest(Op.REQUEST, port=7))
    assert ops(packets(host)) == [Op.RESPONSE]


def test_a_connection_reset_in_the_backlog_makes_room_and_a_finished_one_keeps_its_data() -> None:
    host = Mux()
    listening = host.listen(PORT, 2)
    host.receive(from_guest(Op.REQUEST, port=1))
    host.receive(from_guest(Op.RST, port=1))
    assert not listening.backlog
    host.receive(from_guest(Op.REQUEST, port=2))
    host.receive(from_guest(Op.RW, port=2, payload=b"last words"))
    host.receive(from_guest(Op.SHUTDOWN, port=2, flags=3))
    (connection,) = listening.backlog
    assert host.read(connection, None) == b"last words"
    assert connection.peer_ended_sending


def test_floods_cost_a_bounded_amount_of_memory_until_reading_pauses() -> None:
    host = Mux()
    listening = host.listen(PORT, 8)
    count = 0
    while not host.congested:
        host.receive(from_guest(Op.REQUEST, port=count))
        host.receive(from_guest(Op.CREDIT_REQUEST, port=count))
        host.receive(from_guest(Op.RST, port=count))
        host.receive(from_guest(Op.RW, port=count, to=77))
        count += 1
        assert count <= MAX_CONTROL
    assert len(host._connections) == len(listening.backlog) == 0
    packets(host)
    assert not host.congested


def test_there_is_a_limit_of_connections(host: Mux) -> None:
    for _ in range(MAX_CONNECTIONS):
        host.dial(7)
    with pytest.raises(OSError, match="too many") as caught:
        host.dial(7)
    assert caught.value.errno == errno.EMFILE
    packets(host)
    host.receive(from_guest(Op.REQUEST))
    assert ops(packets(host)) == [Op.RST]


def test_a_peer_that_never_confirms_a_close_is_reset_in_time(
    host: Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muxer, "MAX_CLOSING", 3)
    for connection in [accepted(host, port) for port in range(5)]:
        host.close(connection)
    assert len(host._connections) == 3
    sent = packets(host)
    assert [p.dst_port for p in sent if p.op is Op.RST] == [0, 1]
    assert {p.flags for p in sent if p.op is Op.SHUTDOWN} == {Shutdown.BOTH}


def test_a_port_in_flight_is_not_given_out_again(
    host: Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muxer, "_LAST_EPHEMERAL", muxer._FIRST_EPHEMERAL + 2)
    first = [host.dial(7) for _ in range(3)]
    host.abort(first[1])
    assert host.dial(7).local_port == first[1].local_port
    assert len({c.local_port for c in first}) == 3


def test_a_dial_given_up_before_it_was_sent_says_nothing(host: Mux) -> None:
    host.abort(host.dial(7))
    assert packets(host) == []


def test_after_an_abort_the_next_dial_of_the_same_ports_is_a_new_connection(host: Mux) -> None:
    old = accepted(host)
    host.abort(old)
    new = host.receive(from_guest(Op.REQUEST))
    assert new is not None
    assert new is not old
    assert ops(packets(host)) == [Op.RST, Op.RESPONSE]


def test_a_port_has_one_listener(host: Mux) -> None:
    with pytest.raises(OSError, match="listener") as caught:
        host.listen(PORT, 1)
    assert caught.value.errno == errno.EADDRINUSE


def test_closing_a_listener_resets_what_nobody_took(host: Mux) -> None:
    accepted(host)
    host.unlisten(host._listening[PORT])
    assert ops(packets(host)) == [Op.RST]
    host.receive(from_guest(Op.REQUEST, port=10))
    assert ops(packets(host)) == [Op.RST]
