"""Agent frames as bytes: a sans-io codec for the format on the "Wire formats" page of the docs.

Encoders are plain functions from values to ``bytes``. :class:`FrameDecoder` takes bytes in any
chunking and gives :class:`Frame`; :class:`Reader` takes payloads apart. The guest is not trusted:
whatever breaks a bound raises :exc:`WireError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

import attrs

VERSION: Final = 3
AGENT_PORT: Final = 1028
LIFELINE_PORT: Final = 1029
EGRESS_PORT: Final = 1030

#: The largest payload of a DATA frame that this side sends, and of one that it accepts.
MAX_DATA: Final = 65536
#: The largest payload of a UDP datagram.
MAX_DATAGRAM: Final = 65507
MAX_PAYLOAD: Final = 2 << 20
MAX_ITEMS: Final = 65536
NO_CAP: Final = (1 << 64) - 1

_HEADER: Final = struct.Struct("<IBBH")
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_ACK: Final = struct.Struct("<Ii")
_EXIT: Final = struct.Struct("<iIQQ")
_CONNECT: Final = struct.Struct("<II")
_OPEN: Final = struct.Struct("<II16s")
_MAPPED: Final = bytes(10) + b"\xff\xff"  # what an IPv4 address follows among those of IPv6
_MAX_PORT: Final = 65535


class WireError(Exception):
    """The peer broke the protocol, or a request does not fit into it."""


class FrameType(IntEnum):
    """Frame types; the names are those of the docs page."""

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


class StreamId(IntEnum):
    """The ``stream`` of DATA, END, WINDOW and CLOSE frames."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    STAGED = 3

    #: The one stream of READ_FILE and WRITE_FILE.
    FILE = 0


class Protocol(IntEnum):
    """What a connection through the agent is, by the numbers of IP."""

    TCP = 6
    UDP = 17


_PROTOCOLS: Final = frozenset(int(protocol) for protocol in Protocol)


class ExecFlags(IntFlag):
    """Flags of EXEC."""

    NONE = 0
    TTY = 1
    STDIN = 2
    REPLACE_ENV = 4
    NULL_STDOUT = 8
    NULL_STDERR = 16
    STDERR_TO_STDOUT = 32


EXIT_TIMED_OUT: Final = 1

#: The ``value`` of an exec's ERROR when its working directory is what failed.
FAILED_AT_CWD: Final = 1


class Frame(NamedTuple):
    """One frame, or a piece of a DATA frame.

    ``type`` is a plain int so that an unknown one can be reported.
    """

    type: int
    stream: int
    payload: bytes


class FrameDecoder:
    """Bytes in any chunking in, frames out: whole ones, but DATA in pieces, as it comes.

    With ``datagrams`` DATA comes in whole frames, too.
    """

    def __init__(self, *, datagrams: bool = False) -> None:
        self._datagrams = datagrams
        self._buffer: bytes | bytearray = b""
        self._offset = 0
        # Of the DATA frame that has begun: what is still to come, and its stream.
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
        """Iterate over what has come. :raises WireError: a header breaks a bound."""
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
        """How many bytes the frame under way needs, as far as is known, when :attr:`partial`.

        Else those of a header. With ``datagrams`` only, and when :meth:`frames` has given all.
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
    """Takes a payload apart, field by field. Every method raises :exc:`WireError` at its end."""

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
        return self._struct("<I")

    def i32(self) -> int:
        return self._struct("<i")

    def u64(self) -> int:
        return self._struct("<Q")

    def string(self) -> str:
        length = self.u32()
        if len(self.payload) - self.offset < length:
            raise WireError("payload too short")
        raw = self.payload[self.offset : self.offset + length]
        self.offset += length
        return raw.decode("utf-8", "surrogateescape")

    def end(self) -> None:
        if self.offset != len(self.payload):
            raise WireError("payload too long")


def frame(type_: FrameType, payload: bytes = b"", stream: int = 0) -> bytes:
    """A frame as bytes. :raises WireError: the payload is larger than a frame can be."""
    if len(payload) > MAX_PAYLOAD:
        raise WireError(f"{type_.name} of {len(payload)} bytes; the most is {MAX_PAYLOAD}")
    return _HEADER.pack(len(payload), type_, stream, 0) + payload


def data_frames(stream: int, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
    """``data`` as DATA frames."""
    view = memoryview(data).cast("B")
    for start in range(0, len(view), MAX_DATA):
        part = view[start : start + MAX_DATA]
        yield b"".join((_HEADER.pack(len(part), FrameType.DATA, stream, 0), part))


def end(stream: int) -> bytes:
    return frame(FrameType.END, stream=stream)


def close(stream: int) -> bytes:
    return frame(FrameType.CLOSE, stream=stream)


def window(stream: int, credit: int) -> bytes:
    return frame(FrameType.WINDOW, _U32.pack(credit), stream)


def signal(sequence: int, signum: int, *, group: bool) -> bytes:
    return frame(FrameType.SIGNAL, struct.pack("<IiI", sequence, signum, group))


def resize(columns: int, rows: int) -> bytes:
    return frame(FrameType.RESIZE, struct.pack("<HH", columns, rows))


def string(value: str | bytes) -> bytes:
    """A string field. :raises ValueError: it holds NUL, which no path, argument or name can."""
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    if b"\0" in raw:
        raise ValueError(f"embedded null byte in {value!r}")
    return blob(raw)


def blob(raw: bytes) -> bytes:
    """A string field that may hold any byte."""
    return _U32.pack(len(raw)) + raw


def strings(values: Sequence[str | bytes]) -> bytes:
    if len(values) > MAX_ITEMS:
        raise WireError(f"a list of {len(values)} strings; the most is {MAX_ITEMS}")
    return _U32.pack(len(values)) + b"".join(map(string, values))


@attrs.frozen(kw_only=True)
class StagedFile:
    """A file that the guest writes before a program starts."""

    path: str | bytes
    data: bytes = attrs.field(repr=False)
    mode: int = 0o644


@attrs.frozen(kw_only=True)
class ExecRequest:
    """What to run. ``timeout`` in seconds; ``window`` in bytes for stdout and for stderr."""

    chain: Sequence[Sequence[str | bytes]]
    flags: ExecFlags = ExecFlags.NONE
    timeout: float | None = None
    columns: int = 0
    rows: int = 0
    window: int = 256 * 1024
    cwd: str | bytes = ""
    user: str = ""
    environment: Sequence[str | bytes] = ()
    files: Sequence[StagedFile] = ()
    #: There will be no input: the END of stdin follows at once.
    empty_stdin: bool = False

    def encode(self) -> Iterator[bytes]:
        """As an EXEC frame, the staged files' DATA frames, and the END of an empty stdin.

        :raises ValueError: NUL in a string. :raises WireError: larger than the protocol allows.
        """
        timeout_ms = 0 if self.timeout is None else max(1, round(self.timeout * 1000))
        payload = [
            struct.pack(
                "<IIHHI",
                self.flags,
                min(timeout_ms, 0xFFFFFFFF),
                self.columns,
                self.rows,
                self.window,
            ),
            string(self.cwd),
            string(self.user),
            strings(self.environment),
            _U32.pack(len(self.chain)),
            *map(strings, self.chain),
            _U32.pack(len(self.files)),
        ]
        for file in self.files:
            payload += (string(file.path), struct.pack("<IQ", file.mode, len(file.data)))
        yield frame(FrameType.EXEC, b"".join(payload))
        for file in self.files:
            yield from data_frames(StreamId.STAGED, file.data)
        if self.empty_stdin:
            yield end(StreamId.STDIN)


def read_file(path: str | bytes, max_bytes: int = NO_CAP) -> bytes:
    return frame(FrameType.READ_FILE, string(path) + struct.pack("<Q", max_bytes))


def write_file(path: str | bytes, mode: int) -> bytes:
    return frame(FrameType.WRITE_FILE, string(path) + _U32.pack(mode))


#: What answers SHUTDOWN with OK: all has been written, and the machine may be ended at once.
ALL_IS_WRITTEN: Final = _U64.pack(1)


def shutdown(grace_ms: int) -> bytes:
    return frame(FrameType.SHUTDOWN, _U32.pack(grace_ms))


def workload_start(argv: Sequence[str]) -> bytes:
    """Start the image's workload, which SETUP left out."""
    return frame(FrameType.WORKLOAD_START, strings(argv))


def workload_signal(signum: int) -> bytes:
    return frame(FrameType.WORKLOAD_SIGNAL, struct.pack("<i", signum))


def set_clock(realtime_ns: int) -> bytes:
    return frame(FrameType.SET_CLOCK, struct.pack("<Q", realtime_ns))


def freeze() -> bytes:
    """Answered by OK when no program in the guest runs, or by ERROR; see :func:`thaw`."""
    return frame(FrameType.FREEZE)


def thaw() -> bytes:
    return frame(FrameType.THAW)


def await_listener(timeout_ms: int, port: int = 0) -> bytes:
    """Answered by OK with ``port`` when it is listened on, or with 0 at the timeout.

    Port 0: any, the answer being the one that was listened on first.
    """
    return frame(FrameType.AWAIT_LISTENER, _CONNECT.pack(timeout_ms, _port(port)))


def connect(protocol: Protocol, port: int) -> bytes:
    """Answered by OK with the port, or by ERROR. Port 0, of TCP: the first that is listened on."""
    return frame(FrameType.CONNECT, _CONNECT.pack(protocol, _port(port)))


def ok(value: int = 0) -> bytes:
    return frame(FrameType.OK, _U64.pack(value))


def error(errno: int, message: str) -> bytes:
    return frame(FrameType.ERROR, struct.pack("<i", errno) + string(message) + _U64.pack(0))


def _port(port: int) -> int:
    if not 0 <= port <= _MAX_PORT:
        raise ValueError(f"{port} is not a port")
    return port


@attrs.frozen
class Open:
    """An OPEN frame: where a program of the guest wants to go."""

    protocol: Protocol
    address: IPv4Address | IPv6Address
    port: int

    @classmethod
    def decode(cls, payload: bytes) -> Open:
        if len(payload) != _OPEN.size:
            raise WireError(f"an OPEN of {len(payload)} bytes")
        protocol, port, raw = _OPEN.unpack(payload)
        if protocol not in _PROTOCOLS or not 0 <= port <= _MAX_PORT:
            raise WireError(f"an OPEN for protocol {protocol}, port {port}")
        mapped = raw[:12] == _MAPPED
        address = IPv4Address(raw[12:]) if mapped else IPv6Address(raw)
        return cls(Protocol(protocol), address, port)

    def encode(self) -> bytes:
        raw = self.address.packed
        if isinstance(self.address, IPv4Address):
            raw = _MAPPED + raw
        return frame(FrameType.OPEN, _OPEN.pack(self.protocol, _port(self.port), raw))


@attrs.frozen
class GuestError:
    """An ERROR frame."""

    errno: int
    message: str
    value: int

    @classmethod
    def decode(cls, payload: bytes) -> GuestError:
        reader = Reader(payload)
        error = cls(reader.i32(), reader.string(), reader.u64())
        reader.end()
        return error


@attrs.frozen
class Exit:
    """An EXIT frame; ``duration`` in seconds, ``peak_rss_kib`` as ``getrusage`` counts it."""

    returncode: int
    timed_out: bool
    duration: float
    peak_rss_kib: int

    @classmethod
    def decode(cls, payload: bytes) -> Exit:
        returncode, flags, microseconds, peak = _unpack(_EXIT, payload)
        return cls(returncode, bool(flags & EXIT_TIMED_OUT), microseconds / 1e6, peak)


def decode_u32(payload: bytes) -> int:
    (value,) = _unpack(_U32, payload)
    return value


def decode_u64(payload: bytes) -> int:
    (value,) = _unpack(_U64, payload)
    return value


def decode_ack(payload: bytes) -> tuple[int, int]:
    """The sequence number and the errno of an ACK frame."""
    sequence, errno = _unpack(_ACK, payload)
    return sequence, errno


def _unpack(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    """A payload of fixed size. :raises WireError: this one has another."""
    if len(payload) != layout.size:
        raise WireError(f"a payload of {len(payload)} bytes in the place of {layout.size}")
    return layout.unpack(payload)
