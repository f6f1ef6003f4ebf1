"""The state machine of one exec, driven frame by frame, without a guest."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.agent import wire
from trio_supermachine.agent.execution import ExecProtocol
from trio_supermachine.agent.wire import Frame, FrameDecoder, FrameType, StreamId, WireError

WINDOW = 1000
STARTED = wire.frame(FrameType.STARTED, struct.pack("<I", 42))
EXIT = wire.frame(FrameType.EXIT, struct.pack("<iIQQ", -9, 0, 1_500_000, 77))


def protocol(*, stdin: bool = True, started: bool = True) -> ExecProtocol:
    outputs = (StreamId.STDOUT, StreamId.STDERR)
    made = ExecProtocol(WINDOW, outputs=outputs, stdin=stdin)
    if started:
        made.receive(STARTED)
    return made


def sent(protocol: ExecProtocol) -> list[Frame]:
    decoder = FrameDecoder()
    decoder.feed(protocol.outgoing())
    return list(decoder.frames())


def data(stream: int, payload: bytes) -> bytes:
    return wire.frame(FrameType.DATA, payload, stream)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 600)), max_size=40), st.data())
def test_output_within_the_windows_arrives_whole_and_credit_comes_back(
    writes: list[tuple[bool, int]], draw: st.DataObject
) -> None:
    exec_ = protocol()
    credit = {StreamId.STDOUT: WINDOW, StreamId.STDERR: WINDOW}
    written: dict[StreamId, bytes] = {StreamId.STDOUT: b"", StreamId.STDERR: b""}
    taken: dict[StreamId, bytes] = {StreamId.STDOUT: b"", StreamId.STDERR: b""}
    for is_err, size in writes:
        stream = StreamId.STDERR if is_err else StreamId.STDOUT
        payload = bytes([len(written[stream]) % 251]) * min(size, credit[stream])
        if payload:
            exec_.receive(data(stream, payload))
            credit[stream] -= len(payload)
            written[stream] += payload
        reading = draw.draw(st.sampled_from(list(credit)))
        taken[reading] += exec_.take(reading, draw.draw(st.integers(1, 2000))) or b""
        for frame in sent(exec_):
            assert frame.type == FrameType.WINDOW
            credit[StreamId(frame.stream)] += wire.decode_u32(frame.payload)
        assert all(c <= WINDOW for c in credit.values())
    for stream in taken:
        exec_.receive(wire.end(stream))
        while chunk := exec_.take(stream):
            taken[stream] += chunk
        assert exec_.take(stream) == b""
    assert taken == written


def test_a_reader_that_took_everything_leaves_at_least_half_of_the_window() -> None:
    exec_ = protocol()
    left = WINDOW
    for _ in range(100):
        exec_.receive(data(1, b"x" * 10))
        left -= 10
        exec_.take(StreamId.STDOUT)
        left += sum(wire.decode_u32(f.payload) for f in sent(exec_))
        assert left * 2 > WINDOW


def test_output_beyond_the_window_is_refused() -> None:
    exec_ = protocol()
    exec_.receive(data(1, b"x" * WINDOW))
    with pytest.raises(WireError):
        exec_.receive(data(1, b"x"))


def test_a_closed_output_is_told_once_and_what_is_under_way_is_dropped() -> None:
    exec_ = protocol()
    exec_.receive(data(1, b"unread"))
    exec_.close_output(StreamId.STDOUT)
    exec_.close_output(StreamId.STDOUT)
    assert [(f.type, f.stream) for f in sent(exec_)] == [(FrameType.CLOSE, 1)]
    exec_.receive(data(1, b"x" * WINDOW))
    assert exec_.take(StreamId.STDOUT) is None


def test_stdin_is_sent_within_its_credit_only() -> None:
    exec_ = protocol()
    with pytest.raises(ValueError, match="credit"):
        exec_.stdin_data(b"x")
    exec_.receive(wire.window(0, 10))
    exec_.stdin_data(b"x" * 7)
    assert exec_.stdin_credit == 3


def test_a_guest_cannot_grow_its_credit_without_bound() -> None:
    exec_ = protocol()
    exec_.receive(wire.window(0, 1 << 31))
    with pytest.raises(WireError):
        exec_.receive(wire.window(0, 1 << 31))


def test_signals_that_wait_are_sent_once_and_acknowledged_by_number() -> None:
    exec_ = protocol()
    first = exec_.signal(15)
    assert exec_.signal(15) == first
    group = exec_.signal(9, group=True)
    frames = [struct.unpack("<IiI", f.payload) for f in sent(exec_)]
    assert frames == [(first, 15, 0), (group, 9, 1)]
    assert exec_.signal(15) != first
    with exec_.awaited_ack(first):
        exec_.receive(wire.frame(FrameType.ACK, struct.pack("<Ii", first, 3)))
        assert exec_.acks == {first: 3}
    exec_.receive(wire.frame(FrameType.ACK, struct.pack("<Ii", group, 0)))
    assert exec_.acks == {}


def test_the_newest_terminal_size_wins() -> None:
    exec_ = protocol()
    exec_.resize(1, 2)
    exec_.resize(3, 4)
    assert [f.payload for f in sent(exec_)] == [struct.pack("<HH", 3, 4)]


def test_it_is_finished_at_exit_and_end_of_output() -> None:
    exec_ = protocol()
    exec_.receive(EXIT + wire.end(1))
    assert exec_.exit is not None
    assert (exec_.exit.returncode, exec_.exit.duration, exec_.exit.peak_rss_kib) == (-9, 1.5, 77)
    assert not exec_.finished
    exec_.receive(wire.end(2))
    assert exec_.finished


@given(st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=40), st.integers(0, 4))))
def test_any_sequence_of_frames_is_taken_or_refused_as_a_protocol_error(
    frames: list[tuple[int, bytes, int]],
) -> None:
    exec_ = ExecProtocol(WINDOW, outputs=(StreamId.STDOUT,), stdin=True)
    try:
        for type_, payload, stream in frames:
            exec_.receive(struct.pack("<IBBH", len(payload), type_, stream, 0) + payload)
    except WireError:
        pass
    exec_.outgoing()
