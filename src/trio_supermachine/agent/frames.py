"""Frames as bytes, and their payloads field by field; :mod:`.wire` has what they say.

A frame is a header of 8 bytes (length, type, stream, zero) and a payload. :class:`FrameDecoder`
takes bytes in any chunking and gives frames. DATA is the one type that may be long, and comes in
pieces as it arrives; every other frame comes whole. :class:`Reader` takes the payloads of these
apart, and checks that they are used up exactly.

The guest is not trusted. A length is checked before anything is kept for it, so a guest makes the
host hold one frame of 2 MiB for each connection at most. Whatever breaks a bound raises
:exc:`WireError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Final, NamedTuple

import attrs

#: The largest payload of a DATA frame that this side sends, and of one that it accepts.
MAX_DATA: Final = 65536
#: The largest payload of any other frame than DATA.
MAX_PAYLOAD: Final = 2 << 20
#: The most strings of one list.
MAX_ITEMS: Final = 65536

_HEADER: Final = struct.Struct("<IBBH")
_U32: Final = struct.Struct("<I")


class WireError(Exception):
    """The peer broke the protocol, or a request does not fit into it."""


class FrameType(IntEnum):
    """Types of frames, under the names of the docs page."""

    HELLO = 1
    SETUP = 2
    READY = 3
    ERROR = 4
    OK = 5
    RESTORE = 6
    EXEC = 8
    STARTED = 9
    DATA = 10
    END = 11
    WINDOW = 12
    CLOSE = 13
    SIGNAL = 14
    ACK = 15
    RESIZE = 16
    EXIT = 17
    READ_FILE = 24
    WRITE_FILE = 25
    PING = 32
    SHUTDOWN = 33
    WORKLOAD_SIGNAL = 34
    WORKLOAD_WAIT = 35
    SET_CLOCK = 36
    FREEZE = 37
    THAW = 38
    AWAIT_LISTENER = 39
    CONNECT = 40
    WORKLOAD_START = 41
    OPEN = 48


_DATA: Final = int(FrameType.DATA)


class Frame(NamedTuple):
    """One frame, or a piece of a DATA frame.

    ``type`` is a plain int so that an unknown one can be reported.
    """

    type: int
    stream: int
    payload: bytes


class FrameDecoder:
    """A decoder of frames from bytes in any chunking.

    :param datagrams: give DATA in whole frames, too. Otherwise each piece comes as it arrives.
    """

    def __init__(self, *, datagrams: bool = False) -> None:
        self._datagrams = datagrams
        self._buffer: bytes | bytearray = b""
        self._offset = 0
        # The DATA frame that has begun: the bytes that are still to come, and its stream.
        self._data_left = 0
        self._data_stream = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add what was received; :meth:`frames` gives what it completed."""
        buffer, offset = self._buffer, self._offset
        self._offset = 0
        if offset == len(buffer):
            self._buffer = bytes(data)
            return
        if isinstance(buffer, bytearray):
            del buffer[:offset]
        else:
            self._buffer = buffer = bytearray(buffer[offset:])
        buffer += data

    def frames(self) -> Iterator[Frame]:
        """Iterate over the frames that are here. :raises WireError: a header breaks a bound."""
        buffer = self._buffer
        size = len(buffer)
        while True:
            start = self._offset
            if self._data_left:
                end = min(start + self._data_left, size)
                if end == start:
                    return
                self._offset = end
                self._data_left -= end - start
                yield Frame(_DATA, self._data_stream, bytes(buffer[start:end]))
                continue
            if size - start < _HEADER.size:
                return
            length, type_, stream, zero = _HEADER.unpack_from(buffer, start)
            most = MAX_DATA if type_ == _DATA or self._datagrams else MAX_PAYLOAD
            if length > most or zero:
                raise WireError(f"bad frame header: type {type_}, length {length}")
            start += _HEADER.size
            if type_ == _DATA and length and not self._datagrams:
                self._offset = start
                self._data_left, self._data_stream = length, stream
                continue
            end = start + length
            if end > size:
                return
            self._offset = end
            yield Frame(type_, stream, bytes(buffer[start:end]))

    @property
    def wanted(self) -> int:
        """The bytes that the next frame lacks, as far as its header is here; else a header's.

        It makes sense with ``datagrams``, and when :meth:`frames` has given all.
        """
        held = len(self._buffer) - self._offset
        if held < _HEADER.size:
            return _HEADER.size - held
        length, *_ = _HEADER.unpack_from(self._buffer, self._offset)
        assert isinstance(length, int)
        return _HEADER.size + length - held

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return self._data_left > 0 or len(self._buffer) > self._offset


@attrs.define
class Reader:
    """A payload that is taken apart, field by field.

    Every method raises :exc:`WireError` where the payload is too short for it.
    """

    payload: bytes
    offset: int = 0

    def _struct(self, layout: str) -> int:
        size = struct.calcsize(layout)
        if len(self.payload) - self.offset < size:
            raise WireError("payload too short")
        (value,) = struct.unpack_from(layout, self.payload, self.offset)
        self.offset += size
        assert isinstance(value, int)
        return value

    def u32(self) -> int:
        """Take an unsigned number of 32 bits."""
        return self._struct("<I")

    def i32(self) -> int:
        """Take a signed number of 32 bits."""
        return self._struct("<i")

    def u64(self) -> int:
        """Take an unsigned number of 64 bits."""
        return self._struct("<Q")

    def string(self) -> str:
        """Take a string field. Bytes that are no UTF-8 become lone surrogates."""
        length = self.u32()
        if len(self.payload) - self.offset < length:
            raise WireError("payload too short")
        raw = self.payload[self.offset : self.offset + length]
        self.offset += length
        return raw.decode("utf-8", "surrogateescape")

    def end(self) -> None:
        """Check that the payload is used up. :raises WireError: it is not."""
        if self.offset != len(self.payload):
            raise WireError("payload too long")


def frame(type_: FrameType, payload: bytes = b"", stream: int = 0) -> bytes:
    """Encode a frame. :raises WireError: the payload is larger than a frame can be."""
    if len(payload) > MAX_PAYLOAD:
        raise WireError(f"{type_.name} of {len(payload)} bytes; the most is {MAX_PAYLOAD}")
    return _HEADER.pack(len(payload), type_, stream, 0) + payload


def data_frames(stream: int, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
    """Encode ``data`` as DATA frames, each as large as it may be."""
    view = memoryview(data).cast("B")
    for start in range(0, len(view), MAX_DATA):
        part = view[start : start + MAX_DATA]
        yield b"".join((_HEADER.pack(len(part), FrameType.DATA, stream, 0), part))


def string(value: str | bytes) -> bytes:
    """Encode a string field. :raises ValueError: it holds NUL, as no path or argument can."""
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    if b"\0" in raw:
        raise ValueError(f"embedded null byte in {value!r}")
    return blob(raw)


def blob(raw: bytes) -> bytes:
    """Encode a string field that may hold any byte."""
    return _U32.pack(len(raw)) + raw


def strings(values: Sequence[str | bytes]) -> bytes:
    """Encode a list of strings. :raises WireError: it is too long."""
    if len(values) > MAX_ITEMS:
        raise WireError(f"a list of {len(values)} strings; the most is {MAX_ITEMS}")
    return _U32.pack(len(values)) + b"".join(map(string, values))
