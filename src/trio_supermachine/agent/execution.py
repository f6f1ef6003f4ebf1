"""One exec as the host sees it: a sans-io state machine over agent frames.

Bytes of the agent's connection go into :meth:`ExecProtocol.receive`; what has to be sent comes out
of :meth:`ExecProtocol.outgoing`. All it holds is bounded by the windows it granted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import attrs

from . import wire
from .wire import Exit, Frame, FrameType, GuestError, StreamId, WireError

_MAX_CREDIT: Final = 1 << 31


@attrs.define
class _Output:
    """What the guest sent on stdout or stderr and nobody has taken yet."""

    window: int
    chunks: deque[bytes] = attrs.field(factory=deque)
    #: Bytes taken since the last WINDOW frame.
    freed: int = 0
    ended: bool = False
    closed: bool = False


class ExecProtocol:
    """The state of one exec after its request has been sent.

    :param window: the ``window`` of the request, in bytes.
    :param outputs: the streams that the guest sends (a terminal has no stderr); others are empty.
    :param stdin: whether the request opened stdin.
    """

    def __init__(self, window: int, *, outputs: tuple[StreamId, ...], stdin: bool) -> None:
        self.pid: int | None = None
        self.error: GuestError | None = None
        self.exit: Exit | None = None
        #: Bytes of stdin that the guest is ready to take.
        self.stdin_credit = 0
        #: Nobody reads stdin any more, or it was never open.
        self.stdin_closed = not stdin
        self.acks: dict[int, int] = {}
        self._decoder = wire.FrameDecoder()
        self._window = window
        # By number: frames have no more than that.
        self._outputs = {int(stream): _Output(window) for stream in outputs}
        self._control: list[bytes] = []
        self._signals: dict[tuple[int, bool], int] = {}
        self._resize: bytes | None = None
        self._sequence = 0
        #: How many tasks wait for the ACK of a signal.
        self._awaited: dict[int, int] = {}
        self._stdin_ended = not stdin

    # What comes from the guest

    def receive(self, data: bytes | bytearray) -> None:
        """Take in received bytes. :raises WireError: the guest broke the protocol."""
        self._decoder.feed(data)
        for frame in self._decoder.frames():
            self._receive_frame(frame)

    @property
    def finished(self) -> bool:
        """Whether the guest has nothing more to say: the program is gone and its output ended."""
        if self.exit is None:
            return False
        return all(output.ended or output.closed for output in self._outputs.values())

    def _receive_frame(self, frame: Frame) -> None:
        match frame.type:
            case FrameType.DATA:
                self._receive_data(self._output(frame), frame.payload)
            case FrameType.END:
                self._output(frame).ended = True
            case FrameType.WINDOW if frame.stream == StreamId.STDIN:
                credit = self.stdin_credit + wire.decode_u32(frame.payload)
                if self.pid is None or credit > _MAX_CREDIT:
                    raise WireError("stdin credit out of bounds")
                self.stdin_credit = credit
            case FrameType.CLOSE if frame.stream == StreamId.STDIN:
                self.stdin_closed = True
            case FrameType.ACK:
                sequence, errno = wire.decode_ack(frame.payload)
                if sequence in self._awaited:
                    self.acks[sequence] = errno
            case FrameType.STARTED if self.pid is None and self.error is None:
                self.pid = wire.decode_u32(frame.payload)
            case FrameType.ERROR if self.pid is None and self.error is None:
                self.error = GuestError.decode(frame.payload)
            case FrameType.EXIT if self.pid is not None and self.exit is None:
                self.exit = Exit.decode(frame.payload)
                self.stdin_closed = True
            case _:
                raise WireError(f"unexpected frame {frame.type} on stream {frame.stream}")

    def _output(self, frame: Frame) -> _Output:
        output = self._outputs.get(frame.stream)
        if output is not None and self.pid is not None and not output.ended:
            return output
        raise WireError(f"unexpected frame {frame.type} on stream {frame.stream}")

    def _receive_data(self, output: _Output, payload: bytes) -> None:
        if output.closed:
            return
        output.window -= len(payload)
        if output.window < 0:
            raise WireError("more output than its window allows")
        if payload:
            output.chunks.append(payload)

    # What the program's user does

    def take(self, stream: StreamId, max_bytes: int | None = None) -> bytes | None:
        """Up to ``max_bytes`` of output, ``b""`` at its end, ``None`` if there is none yet."""
        output = self._outputs.get(stream)
        if output is None or not output.chunks:
            return b"" if output is None or output.ended else None
        chunks = output.chunks
        if max_bytes is None and len(chunks) > 1:
            chunk = b"".join(chunks)
            chunks.clear()
        else:
            chunk = chunks.popleft()
            if max_bytes is not None and len(chunk) > max_bytes:
                chunks.appendleft(chunk[max_bytes:])
                chunk = chunk[:max_bytes]
        self._free(stream, output, len(chunk))
        return chunk

    def has_output(self, stream: StreamId) -> bool:
        """Whether :meth:`take` would give some."""
        output = self._outputs.get(stream)
        return output is not None and bool(output.chunks)

    def has_ended(self, stream: StreamId) -> bool:
        """Whether :meth:`take` will give no more."""
        output = self._outputs.get(stream)
        return output is None or output.closed or (output.ended and not output.chunks)

    def _free(self, stream: StreamId, output: _Output, size: int) -> None:
        output.freed += size
        if output.freed * 2 >= self._window and not output.ended:
            self._control.append(wire.window(stream, output.freed))
            output.window += output.freed
            output.freed = 0

    def discard(self, stream: StreamId) -> None:
        """Throw away what is buffered, keeping the program going."""
        while self.take(stream):
            pass

    def close_output(self, stream: StreamId) -> None:
        """Close the reading end: the program's next write gets SIGPIPE. Idempotent."""
        output = self._outputs.get(stream)
        if output is not None and not output.closed:
            output.closed = True
            output.chunks.clear()
            if not output.ended:
                self._control.append(wire.close(stream))

    def stdin_data(self, data: bytes | bytearray | memoryview) -> bytes:
        """``data`` as a frame to be sent now; it fits the credit, which it uses up."""
        if not 0 < len(data) <= min(self.stdin_credit, wire.MAX_DATA):
            raise ValueError("stdin data beyond its credit")
        self.stdin_credit -= len(data)
        (frame,) = wire.data_frames(StreamId.STDIN, data)
        return frame

    def end_stdin(self) -> None:
        """Close the program's stdin after what was sent. Idempotent."""
        if not self._stdin_ended:
            self._stdin_ended = True
            if not self.stdin_closed:
                self._control.append(wire.end(StreamId.STDIN))

    def signal(self, signum: int, *, group: bool = False) -> int:
        """Send a signal; gives the number under which :attr:`acks` will tell the errno.

        A signal that still waits to be sent is not sent twice, as signals go.
        """
        key = (signum, group)
        if key not in self._signals:
            self._sequence += 1
            self._signals[key] = self._sequence
        return self._signals[key]

    @contextmanager
    def awaited_ack(self, sequence: int) -> Iterator[None]:
        """Within the block, :attr:`acks` gets the errno of this signal when it comes."""
        self._awaited[sequence] = self._awaited.get(sequence, 0) + 1
        try:
            yield
        finally:
            self._awaited[sequence] -= 1
            if not self._awaited[sequence]:
                del self._awaited[sequence]
                self.acks.pop(sequence, None)

    def resize(self, columns: int, rows: int) -> None:
        """Set the terminal's size; the newest wins."""
        self._resize = wire.resize(columns, rows)

    @property
    def has_outgoing(self) -> bool:
        """Whether there are frames to send."""
        return bool(self._control or self._signals) or self._resize is not None

    def outgoing(self) -> bytes:
        """The frames to send now, and forget; ``b""`` if there are none."""
        frames = self._control
        self._control = []
        for (signum, group), sequence in self._signals.items():
            frames.append(wire.signal(sequence, signum, group=group))
        self._signals.clear()
        if self._resize is not None:
            frames.append(self._resize)
            self._resize = None
        return b"".join(frames)
