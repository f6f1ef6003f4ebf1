"""One exec as the host sees it: a state machine over agent frames, without I/O.

Bytes of the agent's connection go into :meth:`ExecProtocol.receive`. Frames to be sent come out of
:meth:`ExecProtocol.outgoing`, and stdin out of :meth:`ExecProtocol.stdin_data`. Three attributes
say in which state an exec is::

    asked ──── STARTED ───▶ running ──── EXIT ───▶ exited ──── END of each output ───▶ finished
    │                       pid                    exit, pid
    └── ERROR ──▶ failed
                  error

- *asked*: the request is on its way, and so may be the END of an empty stdin. STARTED or ERROR
  comes next.
- *running*: output comes on stdout and stderr, each until its END. Credit for stdin comes as WINDOW
  of stream 0; CLOSE of it says that nobody reads stdin any more.
- *exited*: the program has ended, but output may still come, from descendants that hold its pipes
  open. There is no stdin any more, and signals are answered by ``ESRCH``.
- *finished*, or *failed*: the guest has said all and closes. Any connection that ends before is
  broken, which the user of this module tells.

ACK may come in any state; only those are kept for which a task waits. A frame that does not fit
the state is a :exc:`~.wire.WireError`. So is output beyond its window, and so is credit for stdin
beyond 2 GiB.

Memory is bounded, whatever the guest sends: each output holds its window at most (256 KiB unless
the request says otherwise), and a window grows only as output is taken, by half of it at a time so
that few WINDOW frames go out. What waits to be sent is bounded, too: a signal that has not gone yet
is not sent twice, and of several sizes of the terminal the newest counts.
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
    """Output on stdout or stderr that the guest has sent and nobody has taken yet."""

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

    :ivar pid: the process id in the guest, when it has started.
    :ivar error: why it has not started.
    :ivar exit: its end, when it has ended.
    :ivar stdin_credit: bytes of stdin that the guest is ready to take.
    :ivar stdin_closed: nobody reads stdin any more, or it was never open.
    :ivar acks: the errno of each signal that :meth:`awaited_ack` waits for, by its number.
    """

    def __init__(self, window: int, *, outputs: tuple[StreamId, ...], stdin: bool) -> None:
        self.pid: int | None = None
        self.error: GuestError | None = None
        self.exit: Exit | None = None
        self.stdin_credit: int = 0
        self.stdin_closed: bool = not stdin
        self.acks: dict[int, int] = {}
        self._decoder = wire.FrameDecoder()
        self._window = window
        # By number, as frames name them.
        self._outputs = {int(stream): _Output(window) for stream in outputs}
        self._control: list[bytes] = []
        self._signals: dict[tuple[int, bool], int] = {}
        self._resize: bytes | None = None
        self._sequence = 0
        # The number of tasks that wait for the ACK of each signal.
        self._awaited: dict[int, int] = {}
        self._stdin_ended = not stdin

    def receive(self, data: bytes | bytearray) -> None:
        """Take in received bytes. :raises WireError: the guest broke the protocol."""
        self._decoder.feed(data)
        for frame in self._decoder.frames():
            self._receive_frame(frame)

    @property
    def finished(self) -> bool:
        """Whether the guest has said all: the program has ended, and all its output."""
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

    def take(self, stream: StreamId, max_bytes: int | None = None) -> bytes | None:
        """Take up to ``max_bytes`` of output: ``b""`` at its end, ``None`` if there is none yet."""
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
        """Say whether :meth:`take` would give some."""
        output = self._outputs.get(stream)
        return output is not None and bool(output.chunks)

    def has_ended(self, stream: StreamId) -> bool:
        """Say whether :meth:`take` will give no more."""
        output = self._outputs.get(stream)
        return output is None or output.closed or (output.ended and not output.chunks)

    def _free(self, stream: StreamId, output: _Output, size: int) -> None:
        output.freed += size
        if output.freed * 2 >= self._window and not output.ended:
            self._control.append(wire.window(stream, output.freed))
            output.window += output.freed
            output.freed = 0

    def discard(self, stream: StreamId) -> None:
        """Throw away the output that is here, so that the program goes on."""
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
        """Encode ``data`` as a frame to be sent now, and use up credit for it.

        :raises ValueError: it is more than the credit, or than a frame holds.
        """
        if not 0 < len(data) <= min(self.stdin_credit, wire.MAX_DATA):
            raise ValueError("stdin data beyond its credit")
        self.stdin_credit -= len(data)
        (frame,) = wire.data_frames(StreamId.STDIN, data)
        return frame

    def end_stdin(self) -> None:
        """Close the program's stdin, behind what was sent. Idempotent."""
        if not self._stdin_ended:
            self._stdin_ended = True
            if not self.stdin_closed:
                self._control.append(wire.end(StreamId.STDIN))

    def signal(self, signum: int, *, group: bool = False) -> int:
        """Send a signal, and give its number: :attr:`acks` will have the errno under it.

        A signal that still waits to be sent is not sent twice: the kernel, too, merges signals
        that are pending.
        """
        key = (signum, group)
        if key not in self._signals:
            self._sequence += 1
            self._signals[key] = self._sequence
        return self._signals[key]

    @contextmanager
    def awaited_ack(self, sequence: int) -> Iterator[None]:
        """Let :attr:`acks` have the errno of this signal when it comes, for a block's length."""
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
        """Give the frames to send now, and forget them; ``b""`` if there are none."""
        frames = self._control
        self._control = []
        for (signum, group), sequence in self._signals.items():
            frames.append(wire.signal(sequence, signum, group=group))
        self._signals.clear()
        if self._resize is not None:
            frames.append(self._resize)
            self._resize = None
        return b"".join(frames)
