"""Messages between the host and a guest's agent: a codec without I/O.

The "Wire formats" page of the docs has the format. :mod:`.frames` has the frames themselves.

Frames travel on connections, each of which is a stream of vsock packets. There are three kinds:

- To port 1028, the *agent*. The host connects, and its first frame says what for: EXEC, a file,
  CONNECT, or a one-shot call such as PING. Every frame after that belongs to the same exec, file
  or call, so that one that is slow, broken or hostile stops no other.
- To port 1029, the *lifeline*. The guest connects, once when it boots and once when it goes on as a
  copy (:mod:`.greeting`), and its connection stays open as long as the machine runs.
- To port 1030, the *way out*. The guest connects, once for each connection of its programs, and
  sends OPEN. After the answer no more frames follow, but the program's own bytes.

Encoders are plain functions from values to ``bytes``; what comes is read by functions and class
methods named ``decode``. The guest is not trusted: whatever breaks a bound raises
:exc:`WireError`, which ends that connection and nothing else. Which frames may come when is decided
above: for execs by :mod:`.execution`, for all others by :mod:`.client`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv6Address
from typing import Final

import attrs

from .frames import MAX_DATA as MAX_DATA
from .frames import MAX_ITEMS as MAX_ITEMS
from .frames import MAX_PAYLOAD as MAX_PAYLOAD
from .frames import Frame as Frame
from .frames import FrameDecoder as FrameDecoder
from .frames import FrameType as FrameType
from .frames import Reader as Reader
from .frames import WireError as WireError
from .frames import blob as blob
from .frames import data_frames as data_frames
from .frames import frame as frame
from .frames import string as string
from .frames import strings as strings

VERSION: Final = 4
#: Versions of guests in snapshots that can be restored, too.
OLDER_VERSIONS: Final = (3,)
AGENT_PORT: Final = 1028
LIFELINE_PORT: Final = 1029
EGRESS_PORT: Final = 1030

#: The largest payload of a UDP datagram.
MAX_DATAGRAM: Final = 65507
#: The ``max_bytes`` of READ_FILE that caps nothing.
NO_CAP: Final = (1 << 64) - 1

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_ACK: Final = struct.Struct("<Ii")
_EXIT: Final = struct.Struct("<iIQQ")
_CONNECT: Final = struct.Struct("<II")
_OPEN: Final = struct.Struct("<II16s")
_MAPPED: Final = bytes(10) + b"\xff\xff"  # RFC 4291, 2.5.5.2: an IPv4 address follows
_MAX_PORT: Final = 65535


class StreamId(IntEnum):
    """Values of ``stream`` in DATA, END, WINDOW and CLOSE frames."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    STAGED = 3

    #: The one stream of READ_FILE and WRITE_FILE.
    FILE = 0


class Protocol(IntEnum):
    """Transport protocols, by IANA's protocol numbers."""

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


def end(stream: int) -> bytes:
    """Encode END: no more data comes on ``stream``."""
    return frame(FrameType.END, stream=stream)


def close(stream: int) -> bytes:
    """Encode CLOSE: the reader of ``stream`` has gone."""
    return frame(FrameType.CLOSE, stream=stream)


def window(stream: int, credit: int) -> bytes:
    """Encode WINDOW: ``credit`` more bytes may be sent on ``stream``."""
    return frame(FrameType.WINDOW, _U32.pack(credit), stream)


def signal(sequence: int, signum: int, *, group: bool) -> bytes:
    """Encode SIGNAL to a process, or to its group. ACK answers with the same ``sequence``."""
    return frame(FrameType.SIGNAL, struct.pack("<IiI", sequence, signum, group))


def resize(columns: int, rows: int) -> bytes:
    """Encode RESIZE: the terminal's new size, in characters."""
    return frame(FrameType.RESIZE, struct.pack("<HH", columns, rows))


@attrs.frozen(kw_only=True)
class StagedFile:
    """A file that the guest writes before a program starts."""

    path: str | bytes
    data: bytes = attrs.field(repr=False)
    mode: int = 0o644


@attrs.frozen(kw_only=True)
class ExecRequest:
    """The fields of EXEC: programs to run, and how.

    :ivar chain: argument vectors, each run after the success of the one before.
    :ivar timeout: seconds after which the guest kills the process group.
    :ivar columns: the width of a terminal in characters; 0 is the guest's default, as for rows.
    :ivar window: the bytes of stdout, and of stderr, that the guest may send ahead.
    :ivar empty_stdin: there is no input: the END of stdin follows at once.
    """

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
    empty_stdin: bool = False

    def encode(self) -> Iterator[bytes]:
        """Encode it: an EXEC frame, the staged files' DATA frames, the END of an empty stdin.

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
    """Encode READ_FILE. A file of more than ``max_bytes`` is refused."""
    return frame(FrameType.READ_FILE, string(path) + struct.pack("<Q", max_bytes))


def write_file(path: str | bytes, mode: int) -> bytes:
    """Encode WRITE_FILE: DATA and END follow, then the guest renames the file into place."""
    return frame(FrameType.WRITE_FILE, string(path) + _U32.pack(mode))


#: The payload of the OK that answers SHUTDOWN when all is written: the machine may be ended.
ALL_IS_WRITTEN: Final = _U64.pack(1)


def shutdown(grace_ms: int) -> bytes:
    """Encode SHUTDOWN. Programs have ``grace_ms`` milliseconds to end."""
    return frame(FrameType.SHUTDOWN, _U32.pack(grace_ms))


def workload_start(argv: Sequence[str]) -> bytes:
    """Encode WORKLOAD_START, for a workload that SETUP left out."""
    return frame(FrameType.WORKLOAD_START, strings(argv))


def workload_signal(signum: int) -> bytes:
    """Encode WORKLOAD_SIGNAL."""
    return frame(FrameType.WORKLOAD_SIGNAL, struct.pack("<i", signum))


def set_clock(realtime_ns: int) -> bytes:
    """Encode SET_CLOCK: the nanoseconds since 1970."""
    return frame(FrameType.SET_CLOCK, struct.pack("<Q", realtime_ns))


def freeze() -> bytes:
    """Encode FREEZE. OK answers when no program in the guest runs, else ERROR."""
    return frame(FrameType.FREEZE)


def thaw() -> bytes:
    """Encode THAW, which undoes FREEZE. OK answers, also when nothing is frozen."""
    return frame(FrameType.THAW)


def await_listener(timeout_ms: int, port: int = 0) -> bytes:
    """Encode AWAIT_LISTENER. OK answers with the port when it is listened on, or 0 at the timeout.

    :param port: the TCP port; 0 is any, and the answer is the one that was listened on first.
    """
    return frame(FrameType.AWAIT_LISTENER, _CONNECT.pack(timeout_ms, _port(port)))


def connect(protocol: Protocol, port: int) -> bytes:
    """Encode CONNECT. OK with the port answers, or ERROR.

    :param port: the guest's port; 0, of TCP alone, is the one that was listened on first.
    """
    return frame(FrameType.CONNECT, _CONNECT.pack(protocol, _port(port)))


def ok(value: int = 0) -> bytes:
    """Encode OK."""
    return frame(FrameType.OK, _U64.pack(value))


def error(errno: int, message: str) -> bytes:
    """Encode ERROR."""
    return frame(FrameType.ERROR, struct.pack("<i", errno) + string(message) + _U64.pack(0))


def _port(port: int) -> int:
    if not 0 <= port <= _MAX_PORT:
        raise ValueError(f"{port} is not a port")
    return port


@attrs.frozen
class Open:
    """An OPEN frame: the protocol, address and port that a program of the guest wants."""

    protocol: Protocol
    address: IPv4Address | IPv6Address
    port: int

    @classmethod
    def decode(cls, payload: bytes) -> Open:
        """Read a payload. :raises WireError: it makes no sense."""
        if len(payload) != _OPEN.size:
            raise WireError(f"an OPEN of {len(payload)} bytes")
        protocol, port, raw = _OPEN.unpack(payload)
        if protocol not in _PROTOCOLS or not 0 <= port <= _MAX_PORT:
            raise WireError(f"an OPEN for protocol {protocol}, port {port}")
        mapped = raw[:12] == _MAPPED
        address = IPv4Address(raw[12:]) if mapped else IPv6Address(raw)
        return cls(Protocol(protocol), address, port)

    def encode(self) -> bytes:
        """Encode it as a frame."""
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
        """Read a payload. :raises WireError: it makes no sense."""
        reader = Reader(payload)
        error = cls(reader.i32(), reader.string(), reader.u64())
        reader.end()
        return error


@attrs.frozen
class Exit:
    """An EXIT frame: a program's end.

    :ivar returncode: its exit status, negative for a signal.
    :ivar duration: seconds from its start to its end.
    :ivar peak_rss_kib: its largest resident set in KiB, as ``getrusage`` counts it.
    """

    returncode: int
    timed_out: bool
    duration: float
    peak_rss_kib: int

    @classmethod
    def decode(cls, payload: bytes) -> Exit:
        """Read a payload. :raises WireError: it has the wrong size."""
        returncode, flags, microseconds, peak = _unpack(_EXIT, payload)
        return cls(returncode, bool(flags & EXIT_TIMED_OUT), microseconds / 1e6, peak)


def decode_u32(payload: bytes) -> int:
    """Read the payload of WINDOW or STARTED."""
    (value,) = _unpack(_U32, payload)
    return value


def decode_u64(payload: bytes) -> int:
    """Read the payload of OK."""
    (value,) = _unpack(_U64, payload)
    return value


def decode_ack(payload: bytes) -> tuple[int, int]:
    """Read the payload of ACK: a sequence number and an errno."""
    sequence, errno = _unpack(_ACK, payload)
    return sequence, errno


def _unpack(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    """Read a payload of fixed size. :raises WireError: it has another."""
    if len(payload) != layout.size:
        raise WireError(f"a payload of {len(payload)} bytes in the place of {layout.size}")
    return layout.unpack(payload)
