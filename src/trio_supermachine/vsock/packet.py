"""Packets of virtio-vsock: header and payload, as bytes and as values.

See section 5.10.6 of the virtio specification, version 1.2, and the page on wire formats. Every
bound that a header can break is checked here, before a payload is waited for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from ..errors import SupermachineError

HOST_CID: Final = 2
GUEST_CID: Final = 3
MAX_PAYLOAD: Final = 65536
TYPE_STREAM: Final = 1

#: src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt.
HEADER: Final = struct.Struct("<QQIIIHHIII")
HEADER_SIZE: Final = HEADER.size
_LENGTH: Final = struct.Struct("<I")
_LENGTH_AT: Final = 24


class Op(IntEnum):
    """Operation of a packet."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7
    # Not of virtio: what a serial carrier says about itself. See `.framing`.
    FREEZE = 16
    FROZEN = 17
    THAW = 18
    RESET = 19


OPS: Final = {int(op): op for op in Op}
#: Those of virtio, by number.
STREAM_OPS: Final = {number: op for number, op in OPS.items() if op < Op.FREEZE}


class Shutdown(IntFlag):
    """Flags of :attr:`Op.SHUTDOWN`: what the sender of the packet does no more."""

    NO_RECEIVE = 1
    NO_SEND = 2
    BOTH = 3


class VsockProtocolError(SupermachineError):
    """Bytes that no sound vsock transport sends, for which the whole carrier is given up."""


class Packet(NamedTuple):
    """One packet. ``payload`` may be a view of a buffer that its owner uses again.

    A tuple, as it is cheap to make: there is one for every packet that comes in.
    """

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    op: Op
    flags: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0
    payload: bytes | memoryview = b""

    def encode(self) -> bytes:
        """Encode the packet as it travels on a serial carrier."""
        return pack_header(
            self.src_cid,
            self.dst_cid,
            self.src_port,
            self.dst_port,
            len(self.payload),
            self.op,
            self.flags,
            self.buf_alloc,
            self.fwd_cnt,
        ) + bytes(self.payload)


def pack_header(
    src_cid: int,
    dst_cid: int,
    src_port: int,
    dst_port: int,
    length: int,
    op: int,
    flags: int,
    buf_alloc: int,
    fwd_cnt: int,
) -> bytes:
    """Encode the header of a stream packet, 44 bytes."""
    return HEADER.pack(
        src_cid, dst_cid, src_port, dst_port, length, TYPE_STREAM, op, flags, buf_alloc, fwd_cnt
    )


class PacketDecoder:
    """Decoder of a stream of bytes, however it is cut, into packets.

    It holds at most one incomplete packet, so at most ``HEADER_SIZE + max_payload`` bytes.
    """

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self._max_payload = max_payload
        self._partial = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Packet]:
        """Iterate over the packets that ``data`` completes.

        Payloads are views, good until ``data`` is used again: copy those to keep. Use the iterator
        up before the next call.

        :raises VsockProtocolError: a header breaks a bound; the decoder is of no more use.
        """
        view = memoryview(data)
        at = 0
        end = len(view)
        if self._partial:
            at = self._complete(view, HEADER_SIZE)
            if len(self._partial) < HEADER_SIZE:
                return
            total = HEADER_SIZE + self._length(self._partial, 0)
            at += self._complete(view[at:], total)
            if len(self._partial) < total:
                return
            whole, self._partial = self._partial, bytearray()
            yield self._packet(memoryview(whole), 0, total)
        while end - at >= HEADER_SIZE:
            after = at + HEADER_SIZE + self._length(view, at)
            if after > end:
                break
            yield self._packet(view, at, after)
            at = after
        self._partial += view[at:]

    def _complete(self, view: memoryview, total: int) -> int:
        missing = max(0, total - len(self._partial))
        taken = view[:missing]
        self._partial += taken
        return len(taken)

    def _length(self, buffer: bytearray | memoryview, at: int) -> int:
        length: int = _LENGTH.unpack_from(buffer, at + _LENGTH_AT)[0]
        if length > self._max_payload:
            raise VsockProtocolError(f"a vsock packet claims a payload of {length} bytes")
        return length

    def _packet(self, view: memoryview, at: int, after: int) -> Packet:
        src_cid, dst_cid, src_port, dst_port, _, kind, op, flags, alloc, fwd = HEADER.unpack_from(
            view, at
        )
        if kind != TYPE_STREAM:
            raise VsockProtocolError(f"a vsock packet has the unknown type {kind}")
        if op not in OPS:
            raise VsockProtocolError(f"a vsock packet has the unknown operation {op}")
        return Packet(
            src_cid,
            dst_cid,
            src_port,
            dst_port,
            OPS[op],
            flags,
            alloc,
            fwd,
            view[at + HEADER_SIZE : after],
        )
