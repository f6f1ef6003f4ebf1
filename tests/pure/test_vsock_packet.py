"""Packets come out of a byte stream as they went in, and nonsense is found at its header."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.vsock.packet import (
    HEADER_SIZE,
    MAX_PAYLOAD,
    Op,
    Packet,
    PacketDecoder,
    VsockProtocolError,
)

_u32 = st.integers(0, 2**32 - 1)
_u64 = st.integers(0, 2**64 - 1)
_packets = st.builds(
    Packet,
    src_cid=_u64,
    dst_cid=_u64,
    src_port=_u32,
    dst_port=_u32,
    op=st.sampled_from(Op),
    flags=_u32,
    buf_alloc=_u32,
    fwd_cnt=_u32,
    payload=st.binary(max_size=300),
)


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    points = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(points)]


@given(st.lists(_packets, max_size=8), st.lists(st.integers(0, 10_000), max_size=30))
def test_packets_survive_any_cutting_of_the_stream(packets: list[Packet], cuts: list[int]) -> None:
    decoder = PacketDecoder()
    wire = b"".join(packet.encode() for packet in packets)
    found = []
    for piece in _cut(wire, cuts):
        buffer = bytearray(piece)
        found += [(p, bytes(p.payload)) for p in decoder.feed(buffer)]
        buffer[:] = bytes(len(buffer))  # payloads are views: they were copied in time
    assert [payload for _, payload in found] == [packet.payload for packet in packets]
    fields = ("src_cid", "dst_cid", "src_port", "dst_port", "op", "flags", "buf_alloc", "fwd_cnt")
    for (got, _), sent in zip(found, packets, strict=True):
        assert all(getattr(got, name) == getattr(sent, name) for name in fields)


def test_the_header_is_the_one_of_the_specification() -> None:
    wire = Packet(2, 3, 5, 1028, Op.RW, 0, 262144, 7, b"hi").encode()
    assert wire.hex(" ", -4) == (
        "02000000 00000000 03000000 00000000 05000000 04040000 02000000 01000500"
        " 00000000 00000400 07000000 6869"
    )
    assert HEADER_SIZE == 44


def test_the_largest_payload_is_taken_and_one_byte_more_is_refused_before_it_arrives() -> None:
    largest = Packet(3, 2, 1, 2, Op.RW, payload=bytes(MAX_PAYLOAD)).encode()
    assert [len(p.payload) for p in PacketDecoder().feed(largest)] == [MAX_PAYLOAD]
    header = Packet(3, 2, 1, 2, Op.RW, payload=bytes(MAX_PAYLOAD + 1)).encode()[:HEADER_SIZE]
    with pytest.raises(VsockProtocolError, match="65537"):
        list(PacketDecoder().feed(header))
    decoder = PacketDecoder()
    assert list(decoder.feed(header[:30])) == []
    with pytest.raises(VsockProtocolError, match="65537"):
        list(decoder.feed(header[30:]))


@pytest.mark.parametrize("op", [0, 8, 65535])
def test_an_unknown_operation_is_a_protocol_error(op: int) -> None:
    wire = bytearray(Packet(3, 2, 1, 2, Op.RW).encode())
    wire[30:32] = op.to_bytes(2, "little")
    with pytest.raises(VsockProtocolError, match="operation"):
        list(PacketDecoder().feed(wire))


def test_an_unknown_type_is_a_protocol_error() -> None:
    wire = bytearray(Packet(3, 2, 1, 2, Op.RW).encode())
    wire[28] = 2
    with pytest.raises(VsockProtocolError, match="type"):
        list(PacketDecoder().feed(wire))


@given(st.binary(max_size=400), st.integers(1, 50))
def test_noise_gives_packets_or_a_protocol_error_and_nothing_else(data: bytes, step: int) -> None:
    decoder = PacketDecoder()
    try:
        for at in range(0, len(data), step):
            for packet in decoder.feed(data[at : at + step]):
                assert len(packet.payload) <= MAX_PAYLOAD
    except VsockProtocolError:
        pass
