"""Packets as bytes on a serial carrier, and the silence around a capture, without I/O.

Theory of operation. virtio's queues hold whole packets, so a machine with a vsock device can be
captured at any time. A serial port holds bytes: a capture could cut a packet in two, and both the
guest and its copies would be sent the rest. So the two sides fall silent first, by four operations
of their own (see "Silence" on the page on wire formats)::

    TALKING --freeze() sends FREEZE--> FREEZING
            --FROZEN comes--> STILL --thaw() sends THAW--> TALKING

- *TALKING*: packets go both ways.
- *FREEZING*: this side sends nothing more. The peer finishes what it has begun, and packets that
  arrive are handled; their answers wait in the muxer.
- *STILL*: no byte is on its way in either direction. Now the machine can be captured.

A thaw while FREEZING cannot take the FREEZE back. It is remembered, and THAW follows as soon as
FROZEN has come; a freeze before that withdraws the thaw.

A copy that was restored hears RESET first of all: its connections, and its silence, are over.

The peer is not trusted. On a stream of bytes a packet that is wrong in itself leaves no trust in
what follows, so it ends the carrier. FROZEN without a FREEZE is such a packet.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Final

from .connection import Connection
from .muxer import Mux
from .packet import MAX_PAYLOAD, Op, PacketDecoder, VsockProtocolError, pack_header

#: Buffers in one gathered write: Linux takes 1024.
_MAX_BUFFERS: Final = 512


class _Voice(Enum):
    TALKING = "talking"
    FREEZING = "freezing"
    STILL = "still"


class Framing:
    """The packets of ``mux`` on a stream of bytes.

    Bytes that come in go to :meth:`receive`; :meth:`pull` gives those to send.
    """

    def __init__(self, mux: Mux) -> None:
        self._mux = mux
        self._decoder = PacketDecoder()
        self._ops: list[Op] = []
        self._voice = _Voice.TALKING
        self._stillness_wanted = False

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Connection | None]:
        """Act on received bytes; give for each packet the connection that may have changed.

        ``None`` stands for no connection, or a change of :attr:`still`. ``data`` may be used again
        when the iterator is used up.

        :raises VsockProtocolError: the bytes are no packets for this pair of machines.
        """
        mux = self._mux
        for packet in self._decoder.feed(data):
            if packet.src_cid != mux.peer_cid or packet.dst_cid != mux.local_cid:
                raise VsockProtocolError(
                    f"a vsock packet from CID {packet.src_cid} to CID {packet.dst_cid}"
                )
            if packet.op < Op.FREEZE:
                yield mux.receive(packet)
                continue
            if packet.op is not Op.FROZEN or self._voice is not _Voice.FREEZING:
                raise VsockProtocolError(f"an unexpected {packet.op.name} on the carrier")
            self._voice = _Voice.STILL
            if not self._stillness_wanted:
                self.thaw()
            yield None

    def freeze(self) -> None:
        """Fall silent, and ask the peer to, until :meth:`thaw`."""
        self._stillness_wanted = True
        if self._voice is _Voice.TALKING:
            self._voice = _Voice.FREEZING
            self._ops.append(Op.FREEZE)

    @property
    def still(self) -> bool:
        """Whether no byte is on its way in either direction."""
        return self._voice is _Voice.STILL

    def thaw(self) -> None:
        """End the silence of both sides: at once, or when the peer's FROZEN has come."""
        self._stillness_wanted = False
        if self._voice is _Voice.STILL:
            self._voice = _Voice.TALKING
            self._ops.append(Op.THAW)

    def reset_peer(self) -> None:
        """Tell a peer that was restored that its connections are gone. Before all else."""
        self._ops.append(Op.RESET)

    @property
    def has_output(self) -> bool:
        """Whether :meth:`pull` would give anything."""
        return bool(self._ops) or (self._voice is _Voice.TALKING and self._mux.has_output)

    def pull(self, max_bytes: int) -> list[bytes | memoryview]:
        """Give the next packets as buffers: headers, each with its payload behind it.

        The last packet is the one that reaches ``max_bytes``. For payloads see :meth:`.Mux.pull`.
        """
        mux = self._mux
        buffers: list[bytes | memoryview] = [
            pack_header(mux.local_cid, mux.peer_cid, 0, 0, 0, op, 0, 0, 0) for op in self._ops
        ]
        self._ops.clear()
        if self._voice is not _Voice.TALKING:
            return buffers
        size = 0
        while size < max_bytes and len(buffers) < _MAX_BUFFERS and mux.has_output:
            header, payload = mux.pull(MAX_PAYLOAD)
            buffers.append(header)
            if payload:
                buffers.append(payload)
                size += len(payload)
        return buffers
