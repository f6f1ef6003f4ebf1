"""Datagrams over a connection of the agent: each is one DATA frame."""

from __future__ import annotations

import struct
from typing import Final, final

import trio

from ..agent import wire
from ..agent.wire import MAX_DATAGRAM, FrameType, WireError
from ..vsock.stream import VsockStream

_HEADER: Final = struct.Struct("<IBBH")
_RECEIVE: Final = 65536


@final
class DatagramDecoder:
    """A decoder of whole datagrams from bytes in any chunking; without I/O.

    It keeps less than one datagram from one call to the next, whatever the peer sends: frames of
    other types, which may be longer, are refused by their headers.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

    def next(self) -> bytes | None:
        """Give the next whole datagram, or ``None``. :raises WireError: something else comes."""
        buffer = self._buffer
        if len(buffer) < _HEADER.size:
            return None
        length, kind, stream, zero = _HEADER.unpack_from(buffer)
        if kind != FrameType.DATA or stream or zero or length > MAX_DATAGRAM:
            raise WireError(f"frame {kind} of {length} bytes in the place of a datagram")
        end = _HEADER.size + length
        if len(buffer) < end:
            return None
        datagram = bytes(memoryview(buffer)[_HEADER.size : end])
        del buffer[:end]
        return datagram


@final
class DatagramStream:
    """A connection of the agent as a stream of datagrams."""

    def __init__(self, stream: VsockStream) -> None:
        self._stream = stream
        self._decoder = DatagramDecoder()

    def send_nowait(self, datagram: bytes) -> bool:
        """Send a datagram, or drop it if there is no room. Return whether it was sent."""
        if len(datagram) > MAX_DATAGRAM or not self._stream.sendable():
            return False
        self._stream.send_nowait(encode(datagram))
        return True

    async def receive(self) -> bytes | None:
        """Wait for a datagram; ``None`` when the peer leaves or breaks the protocol.

        A cancellation loses nothing.
        """
        try:
            while (datagram := self._decoder.next()) is None:
                data = await self._stream.receive_some(_RECEIVE)
                if not data:
                    return None
                self._decoder.feed(data)
        except (WireError, trio.BrokenResourceError, trio.ClosedResourceError):
            return None
        return datagram


def encode(datagram: bytes) -> bytes:
    """Encode a datagram as a frame."""
    return wire.frame(FrameType.DATA, datagram)
