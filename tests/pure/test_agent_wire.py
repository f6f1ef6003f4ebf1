"""The codec of agent frames holds its bounds and loses nothing in any chunking."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.agent import greeting, wire
from trio_supermachine.agent.wire import ExecRequest, FrameDecoder, FrameType, Reader, WireError

frames = st.lists(
    st.tuples(st.sampled_from(FrameType), st.binary(max_size=300), st.integers(0, 255)), max_size=8
)


def chunked(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(frames, st.lists(st.integers(0, 10_000)))
def test_frames_survive_any_chunking(
    sent: list[tuple[FrameType, bytes, int]], cuts: list[int]
) -> None:
    data = b"".join(wire.frame(type_, payload, stream) for type_, payload, stream in sent)
    decoder = FrameDecoder()
    got = []
    for chunk in chunked(data, cuts):
        decoder.feed(chunk)
        got += list(decoder.frames())
    assert whole((f.type, f.payload, f.stream) for f in got) == whole(sent)
    assert not decoder.partial


@given(frames, st.lists(st.integers(0, 10_000)))
def test_whole_frames_are_taken_out_of_what_is_wanted_and_no_more(
    sent: list[tuple[FrameType, bytes, int]], cuts: list[int]
) -> None:
    data = b"".join(wire.frame(type_, payload, stream) for type_, payload, stream in sent)
    decoder = FrameDecoder(datagrams=True)
    got: list[wire.Frame] = []
    at = 0
    for cut in (*cuts, *[1 << 20] * (2 * len(sent))):
        size = min(decoder.wanted, cut + 1)
        decoder.feed(data[at : at + size])
        at += size
        frames_now = list(decoder.frames())
        assert len(frames_now) <= 1
        got += frames_now
    assert got == [(type_, stream, payload) for type_, payload, stream in sent]
    assert not decoder.partial


def is_not_mapped(address: IPv4Address | IPv6Address) -> bool:
    return getattr(address, "ipv4_mapped", None) is None


opens = st.builds(
    wire.Open,
    st.sampled_from(wire.Protocol),
    st.ip_addresses().filter(is_not_mapped),
    st.integers(0, 65535),
)


@given(opens)
def test_where_a_program_wants_to_go_is_read_as_written(wanted: wire.Open) -> None:
    (frame,) = decoded(wanted.encode())
    assert frame.type == FrameType.OPEN
    assert wire.Open.decode(frame.payload) == wanted


@given(st.binary(max_size=40) | st.binary(min_size=24, max_size=24))
def test_any_bytes_are_a_place_or_break_the_protocol(payload: bytes) -> None:
    try:
        wanted = wire.Open.decode(payload)
    except WireError:
        return
    assert wanted.encode()[8:] == payload


@pytest.mark.parametrize("port", [-1, 65536])
def test_what_is_no_port_is_not_asked_for(port: int) -> None:
    with pytest.raises(ValueError, match=str(port)):
        wire.connect(wire.Protocol.TCP, port)
    with pytest.raises(ValueError, match=str(port)):
        wire.await_listener(0, port)


def decoded(data: bytes) -> list[wire.Frame]:
    decoder = FrameDecoder()
    decoder.feed(data)
    return list(decoder.frames())


def whole(frames: Iterable[tuple[int, bytes, int]]) -> list[tuple[int, bytes, int]]:
    """Frames, with neighbours of DATA on a stream made one: such a frame may come in pieces."""
    joined: list[tuple[int, bytes, int]] = []
    for type_, payload, stream in frames:
        if joined and type_ == FrameType.DATA and joined[-1][::2] == (type_, stream):
            payload = joined.pop()[1] + payload
        joined.append((type_, payload, stream))
    return joined


def test_data_is_given_as_it_comes_and_other_frames_when_they_are_whole() -> None:
    decoder = FrameDecoder()
    decoder.feed(wire.frame(FrameType.DATA, b"abcd", 1)[:-2])
    assert list(decoder.frames()) == [(FrameType.DATA, 1, b"ab")]
    assert decoder.partial
    decoder.feed(b"cd" + wire.frame(FrameType.OK, b"1234")[:-1])
    assert list(decoder.frames()) == [(FrameType.DATA, 1, b"cd")]
    decoder.feed(b"4")
    assert list(decoder.frames()) == [(FrameType.OK, 0, b"1234")]


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_waits_for_more_but_never_grows(data: bytes) -> None:
    decoder = FrameDecoder()
    decoder.feed(data)
    try:
        consumed = sum(8 + len(f.payload) for f in decoder.frames())
    except WireError:
        return
    assert consumed <= len(data)


@pytest.mark.parametrize(
    ("type_", "length"), [(FrameType.DATA, wire.MAX_DATA + 1), (FrameType.OK, wire.MAX_PAYLOAD + 1)]
)
def test_a_frame_beyond_its_bound_is_refused_by_its_header(type_: FrameType, length: int) -> None:
    decoder = FrameDecoder()
    decoder.feed(struct.pack("<IBBH", length, type_, 0, 0))
    with pytest.raises(WireError):
        list(decoder.frames())


@given(st.binary(max_size=64))
def test_decoders_of_payloads_raise_wire_error_and_nothing_else(payload: bytes) -> None:
    for decode in (
        greeting.Hello.decode,
        wire.GuestError.decode,
        wire.Exit.decode,
        wire.decode_u32,
        wire.decode_u64,
        wire.decode_ack,
    ):
        try:
            decode(payload)
        except WireError:
            pass


@given(st.lists(st.binary().map(lambda b: b.replace(b"\0", b"x")), min_size=1, max_size=5))
def test_arguments_are_carried_as_they_are(argv: list[bytes]) -> None:
    (frame,) = ExecRequest(chain=[argv]).encode()
    reader = Reader(frame, 8)
    assert [reader.u32(), reader.u32(), reader.u32(), reader.u32()] == [0, 0, 0, 256 * 1024]
    assert (reader.string(), reader.string()) == ("", "")
    assert reader.u32() == 0
    assert (reader.u32(), reader.u32()) == (1, len(argv))
    got = [reader.string().encode("utf-8", "surrogateescape") for _ in argv]
    assert got == argv
    assert reader.u32() == 0
    reader.end()


def test_two_machines_are_told_different_names() -> None:
    seed = bytes(32)
    one, two = (greeting.Restore(seed=seed).encode(0) for _ in range(2))
    assert one != two
    assert (
        greeting.Setup(seed=seed, hostname="", layers=1).machine_id
        != greeting.Restore(seed=seed).machine_id
    )


def test_a_renewal_holds_what_the_page_says() -> None:
    restore = greeting.Restore(seed=b"\0" * 32, hostname="h", machine_id="1" * 32, boot_id="2")
    reader = Reader(restore.encode(5), 8)
    assert (reader.u32(), reader.u64(), reader.string()) == (wire.VERSION, 5, "h")
    assert (reader.string(), reader.string(), reader.string()) == ("\0" * 32, "1" * 32, "2")
    assert reader.u32() == 0
    reader.end()


def test_a_renewal_for_an_older_guest_has_its_version_and_no_flags() -> None:
    restore = greeting.Restore(seed=b"\0" * 32, hostname="h", machine_id="1" * 32, boot_id="2")
    reader = Reader(restore.encode(5, 3), 8)
    assert (reader.u32(), reader.u64(), reader.string()) == (3, 5, "h")
    assert (reader.string(), reader.string(), reader.string()) == ("\0" * 32, "1" * 32, "2")
    reader.end()


@pytest.mark.parametrize("kind", greeting.HelloKind)
def test_a_greeting_tells_its_kind(kind: greeting.HelloKind) -> None:
    payload = struct.pack("<III", 2, kind, 1) + b"k"
    assert greeting.Hello.decode(payload) == greeting.Hello(2, kind, "k")


def test_a_greeting_of_unknown_kind_is_refused() -> None:
    with pytest.raises(WireError, match="kind"):
        greeting.Hello.decode(struct.pack("<III", 2, 2, 0))


def test_nul_is_refused_in_strings() -> None:
    with pytest.raises(ValueError, match="null byte"):
        list(ExecRequest(chain=[["a\0b"]]).encode())


def test_a_request_that_does_not_fit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(WireError):
        list(ExecRequest(chain=[["x" * wire.MAX_PAYLOAD]]).encode())


@given(st.binary(max_size=3 * wire.MAX_DATA))
def test_data_frames_hold_all_data_in_order(data: bytes) -> None:
    decoder = FrameDecoder()
    for frame in wire.data_frames(1, data):
        decoder.feed(frame)
    got = list(decoder.frames())
    assert b"".join(f.payload for f in got) == data
    assert all(0 < len(f.payload) <= wire.MAX_DATA for f in got)
