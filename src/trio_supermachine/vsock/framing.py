"""Packets as bytes on a serial carrier, and the silence round a capture, without I/O.

What virtio's queues give a guest's kernel for nothing, a serial port has to say in packets of
its own: see "Silence" on the page on wire formats. On a byte stream a packet that is wrong in
itself leaves no trust in what follows, so it ends the carrier.
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
    FREEZING = "freezing"  # silent, and the peer may still have something to say
    STILL = "still"


class Framing:
    """The packets of ``mux`` on a stream of bytes.

    Feed it with :meth:`receive`, and send what :meth:`pull` gives.
    """

    def __init__(self, mux: Mux) -> None:
        self._mux = mux
        self._decoder = PacketDecoder()
        self._ops: list[Op] = []
        self._voice = _Voice.TALKING
        self._stillness_wanted = False

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Connection | None]:
        """Take bytes in; gives for each packet the connection whose state may have changed.

        ``data`` may be used again when the iterator is used up.

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
        """Send nothing, and ask the peer to send nothing, from here to :meth:`thaw`."""
        self._stillness_wanted = True
        if self._voice is _Voice.TALKING:
            self._voice = _Voice.FREEZING
            self._ops.append(Op.FREEZE)

    @property
    def still(self) -> bool:
        """Whether nothing is under way in either direction."""
        return self._voice is _Voice.STILL

    def thaw(self) -> None:
        """Go on, both: at once, or when the peer has come to rest as it was asked to."""
        self._stillness_wanted = False
        if self._voice is _Voice.STILL:
            self._voice = _Voice.TALKING
            self._ops.append(Op.THAW)

    def reset_peer(self) -> None:
        """Tell a peer that was restored that its connections are gone. The first thing to do."""
        self._ops.append(Op.RESET)

    @property
    def has_output(self) -> bool:
        """Whether :meth:`pull` would give anything."""
        return bool(self._ops) or (self._voice is _Voice.TALKING and self._mux.has_output)

    def pull(self, max_bytes: int) -> list[bytes | memoryview]:
        """The next packets as buffers, header and payload in turn.

        Stops after the packet that reaches ``max_bytes``. Payloads are as :meth:`Mux.pull` has it.
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
