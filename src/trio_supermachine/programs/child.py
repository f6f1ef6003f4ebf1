"""Programs running in a guest: what :meth:`Vm.exec` gives.

An exec is one connection to the agent; leaving its block ends it. All protocol state is in
:class:`~.agent.execution.ExecProtocol`.
"""

from __future__ import annotations

import errno as errno_names
import operator
import os
import signal as signals
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Final, TypeAlias, final

import trio

from .._util.conflict import OneAtATime
from .._util.public import public
from .._util.trace import trace
from ..agent import wire
from ..agent.client import AgentClient, guest_os_error
from ..agent.execution import ExecProtocol
from ..agent.wire import ExecFlags, ExecRequest, Exit, StreamId, WireError
from ..vsock.stream import VsockStream
from .request import check_winsize

_KILL_CONFIRMATION: Final = 2.0  # seconds: the longest that a cancellation waits for the guest
_MAX_SIGNAL: Final = 64

# Plain integers: the members' own operators are slow.
_STDIN: Final = int(ExecFlags.STDIN | ExecFlags.TTY)
_NULL_STDOUT: Final = int(ExecFlags.NULL_STDOUT)
_NO_STDERR: Final = int(ExecFlags.TTY | ExecFlags.NULL_STDERR | ExecFlags.STDERR_TO_STDOUT)

#: Streams, and where to put what comes from each.
Captured: TypeAlias = Sequence[tuple[StreamId, list[bytes | bytearray]]]


@final
class _Connection:
    """The I/O of one exec: moves bytes between its agent connection and its protocol state.

    It has no task of its own: what comes is taken in by the task that moves the machine's
    packets, and what is to be said leaves in the call that has it said, or when there is room.
    """

    def __init__(self, client: AgentClient, stream: VsockStream, request: ExecRequest) -> None:
        flags = int(request.flags)
        outputs = []
        if not flags & _NULL_STDOUT:
            outputs.append(StreamId.STDOUT)
        if not flags & _NO_STDERR:
            outputs.append(StreamId.STDERR)
        has_stdin = bool(flags & _STDIN) and not request.empty_stdin
        self.protocol = ExecProtocol(request.window, outputs=tuple(outputs), stdin=has_stdin)
        self._client = client
        self._stream = stream
        self._request = request
        self._changed = trio.lowlevel.ParkingLot()
        self._broken = False
        self._cause: WireError | None = None
        self._left = False

    def start(self) -> None:
        """Take in what comes, until :meth:`close`."""
        self._stream.watch(self._take_in)

    def _take_in(self) -> None:
        protocol = self.protocol
        try:
            while data := self._stream.take():
                protocol.receive(data)
        except WireError as exc:
            self._cause = exc
            self._broken = True
            self._stream.abort()
        if self._stream.ended and not protocol.finished and protocol.error is None:
            self._broken = True
        self.flush()

    def flush(self) -> None:
        """Send what the protocol has to say, now or when there is room; waiters look again."""
        if self.protocol.has_outgoing and self._stream.sendable():
            self._stream.send_nowait(self.protocol.outgoing())
        if self._changed:
            self._changed.unpark_all()

    async def changed(self) -> None:
        """Wait until the protocol's state may have changed.

        :raises VmExited: the machine has ended.
        :raises ExecEof: the connection has ended early.
        :raises trio.ClosedResourceError: the exec's block has been left.
        """
        if self._left and not self._broken:
            raise trio.ClosedResourceError("this exec's block has been left")
        if self.over:
            setup = self.protocol.pid is None
            raise await self._client.failure(self._cause, "an exec", setup=setup)
        await self._changed.park()

    @property
    def over(self) -> bool:
        """Whether no more frames will come."""
        return self._broken or self._stream.ended

    async def stdin_ready(self) -> None:
        """Wait until there is credit and what was sent before has gone."""
        while not (self.protocol.stdin_credit and self._stream.sendable()):
            if self.protocol.stdin_closed and not self._broken:
                raise trio.BrokenResourceError("the program has closed its stdin, or has ended")
            await self.changed()

    async def send_stdin(self, data: memoryview) -> int:
        """Send some of ``data``; gives how much. A cancelled call has sent nothing."""
        await self.stdin_ready()
        size = min(len(data), self.protocol.stdin_credit, wire.MAX_DATA)
        self._stream.send_nowait(self.protocol.stdin_data(data[:size]))
        return size

    async def wait_started(self) -> None:
        """Wait until the program runs. :raises OSError: it could not be started."""
        while self.protocol.pid is None:
            if self.protocol.error is not None:
                at_cwd = self.protocol.error.value == wire.FAILED_AT_CWD
                failed = self._request.cwd if at_cwd else self._request.chain[0][0]
                raise guest_os_error(self.protocol.error, failed)
            await self.changed()

    async def wait_exit(self) -> Exit:
        """Wait until the program has ended."""
        while self.protocol.exit is None:
            await self.changed()
        return self.protocol.exit

    async def collect(self, captured: Captured, others: Sequence[StreamId]) -> bool:
        """Take output into ``captured`` until the program and all its output have ended.

        :returns: whether they have; if not, one of ``others`` has output, or, with nothing to
            capture, may still get some when the program has ended.
        """
        protocol = self.protocol
        streams = (*(stream for stream, _ in captured), *others)
        while True:
            for stream, chunks in captured:
                if chunk := protocol.take(stream):
                    chunks.append(chunk)
            if protocol.has_outgoing:
                self.flush()
            for stream in others:
                if protocol.has_output(stream):
                    return False
            if protocol.exit is not None:
                if all(map(protocol.has_ended, streams)):
                    return True
                if not captured:
                    return False
            await self.changed()

    async def drain(self) -> None:
        """Close stdin, throw away all output, and wait until the program has ended."""
        self.protocol.end_stdin()
        while True:
            self.protocol.discard(StreamId.STDOUT)
            self.protocol.discard(StreamId.STDERR)
            if self.protocol.has_outgoing:
                self.flush()
            if self.protocol.exit is not None:
                return
            await self.changed()

    async def kill(self) -> None:
        """Kill the process group and wait, shielded and bounded, until its leader has ended."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _KILL_CONFIRMATION):
            while not self.over and self.protocol.pid is None and self.protocol.error is None:
                await self._changed.park()
            if self.protocol.exit is None:
                self.protocol.signal(signals.SIGKILL, group=True)
                self.flush()
            while not self.over and self.protocol.exit is None and self.protocol.error is None:
                await self._changed.park()

    def close(self) -> None:
        """Leave the connection, upon which the agent kills what is left of the process group."""
        self._left = True
        if self.protocol.finished or self.protocol.error is not None:
            self._stream.leave()
        else:
            self._stream.abort()
        self._changed.unpark_all()


@final
class _StdinStream(trio.abc.SendStream):
    """The program's stdin."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._use = OneAtATime("another task is already sending to this stdin")
        self._closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._use:
            self._check_open()
            await trio.lowlevel.checkpoint()
            with memoryview(data).cast("B") as view:
                sent = 0
                while sent < len(view):
                    self._check_open()
                    sent += await self._connection.send_stdin(view[sent:])

    async def wait_send_all_might_not_block(self) -> None:
        with self._use:
            self._check_open()
            await trio.lowlevel.checkpoint()
            await self._connection.stdin_ready()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("stdin is closed")

    async def aclose(self) -> None:
        """Close the program's stdin (a terminal gets Ctrl-D). Idempotent."""
        self._closed = True
        self._connection.protocol.end_stdin()
        self._connection.flush()
        await trio.lowlevel.checkpoint()


@final
class _OutputStream(trio.abc.ReceiveStream):
    """The program's stdout or stderr."""

    def __init__(self, connection: _Connection, stream: StreamId) -> None:
        self._connection = connection
        self._stream = stream
        self.use = OneAtATime(f"another task is already receiving from this {stream.name.lower()}")
        self._closed = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be >= 1")
        connection = self._connection
        protocol = connection.protocol
        with self.use:
            await trio.lowlevel.checkpoint()
            while True:
                if self._closed:
                    raise trio.ClosedResourceError(f"{self._stream.name.lower()} is closed")
                chunk = protocol.take(self._stream, max_bytes)
                if chunk is not None:
                    if protocol.has_outgoing:
                        connection.flush()
                    return chunk
                await connection.changed()

    async def aclose(self) -> None:
        """Close the reading end: the program's next write there gets SIGPIPE. Idempotent."""
        self._closed = True
        self._connection.protocol.close_output(self._stream)
        self._connection.flush()
        await trio.lowlevel.checkpoint()


@public
@final
class ExecSignaler:
    """Sends signals to the program of an exec. It may outlive it: after its exit a no-op."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def send_signal(self, signum: int) -> None:
        """Send a signal to the process, without waiting for the guest.

        :raises ValueError: there is no such signal.
        """
        if not 1 <= signum <= _MAX_SIGNAL:
            raise ValueError(f"{signum} is not a signal number")
        if self._connection.protocol.exit is None and not self._connection.over:
            self._connection.protocol.signal(signum)
            self._connection.flush()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signals.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the process; see :meth:`ExecChild.abort` for its whole group."""
        self.send_signal(signals.SIGKILL)

    async def signal(self, signum: int) -> None:
        """Send a signal and wait until the agent has acknowledged it.

        Cancelling may leave it sent or not. :raises ValueError: there is no such signal.
        """
        await trio.lowlevel.checkpoint()
        if not 1 <= signum <= _MAX_SIGNAL:
            raise ValueError(f"{signum} is not a signal number")
        protocol = self._connection.protocol
        if protocol.exit is not None:
            return
        sequence = protocol.signal(signum)
        self._connection.flush()
        with protocol.awaited_ack(sequence):
            while sequence not in protocol.acks:
                if protocol.exit is not None:
                    return
                await self._connection.changed()
            errno = protocol.acks[sequence]
        if errno not in (0, errno_names.ESRCH):
            raise OSError(errno, os.strerror(errno))


@public
@final
class ExecChild:
    """A program running in a guest, much like a :class:`trio.Process`. :meth:`Vm.exec` makes it.

    :ivar stdin: a :class:`trio.abc.SendStream`, or ``None`` without ``stdin=True``.
    :ivar stdout: a :class:`trio.abc.ReceiveStream`.
    :ivar stderr: a :class:`trio.abc.ReceiveStream`, empty for a terminal.
    :ivar pid: the process id in the guest.
    :ivar args: the argument vector it was started with.
    """

    def __init__(self, connection: _Connection, request: ExecRequest) -> None:
        assert connection.protocol.pid is not None
        self._connection = connection
        self._signaler = ExecSignaler(connection)
        self.args = list(request.chain[0])
        self.pid = connection.protocol.pid
        self.stdin: trio.abc.SendStream | None = None
        if int(request.flags) & _STDIN and not request.empty_stdin:
            self.stdin = _StdinStream(connection)
        self._outputs = {
            stream: _OutputStream(connection, stream)
            for stream in (StreamId.STDOUT, StreamId.STDERR)
        }
        self.stdout: trio.abc.ReceiveStream = self._outputs[StreamId.STDOUT]
        self.stderr: trio.abc.ReceiveStream = self._outputs[StreamId.STDERR]

    def __repr__(self) -> str:
        status = "running" if self.returncode is None else f"exited with {self.returncode}"
        return f"<ExecChild {self.args!r} pid {self.pid}: {status}>"

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; ``None`` while it runs."""
        exit_ = self._connection.protocol.exit
        return None if exit_ is None else exit_.returncode

    async def wait(self) -> int:
        """Wait until the program has ended and give its :attr:`returncode`.

        Cancelling ends the waiting alone.

        :raises VmExited: the VM ended first.
        :raises ExecEof: the agent's connection ended first.
        """
        await trio.lowlevel.checkpoint()
        return (await self._connection.wait_exit()).returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal to the process, without waiting; after its exit a no-op."""
        self._signaler.send_signal(signum)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._signaler.terminate()

    def kill(self) -> None:
        """Send SIGKILL to the process; see :meth:`abort` for its whole group."""
        self._signaler.kill()

    async def signal(self, signum: int) -> None:
        """Send a signal and wait until the agent has acknowledged it; after its exit a no-op."""
        await self._signaler.signal(signum)

    def signaler(self) -> ExecSignaler:
        """A handle that can only signal, and may outlive this block."""
        return self._signaler

    async def resize(self, cols: int, rows: int) -> None:
        """Set the size of the terminal, in characters; the program gets SIGWINCH.

        :raises ValueError: a size is not in 1..65535.
        """
        check_winsize(cols, rows)
        self._connection.protocol.resize(cols, rows)
        self._connection.flush()
        await trio.lowlevel.checkpoint()

    def output(self, stream: StreamId) -> trio.abc.ReceiveStream:
        """stdout or stderr."""
        return self._outputs[stream]

    async def collect(self, captured: Captured, others: Sequence[StreamId]) -> bool:
        """Take output as :class:`_Connection` has it."""
        with ExitStack() as uses:
            for stream, _ in captured:
                uses.enter_context(self._outputs[stream].use)
            return await self._connection.collect(captured, others)

    def abort(self) -> None:
        """Send SIGKILL to the whole process group, without waiting."""
        if not self._connection.over:
            self._connection.protocol.signal(signals.SIGKILL, group=True)
            self._connection.flush()

    @property
    def exit(self) -> Exit | None:
        """Return code, duration and peak memory as the agent measured them, after the end."""
        return self._connection.protocol.exit


@asynccontextmanager
async def open_exec(client: AgentClient, request: ExecRequest) -> AsyncIterator[ExecChild]:
    """Start a program.

    Leaving the block normally closes stdin, discards unread output and waits for the program's
    end. Leaving it by an exception or a cancellation kills the process group first.
    """
    trace("exec", "start %r", request.chain)
    try:
        stream = await client.ask(b"".join(request.encode()))
    except (trio.BrokenResourceError, WireError) as exc:
        raise await client.failure(exc, "an exec", setup=True) from exc
    connection = _Connection(client, stream, request)
    try:
        try:
            connection.start()
            await connection.wait_started()
            yield ExecChild(connection, request)
            await connection.drain()
        except BaseException:
            await connection.kill()
            raise
    finally:
        connection.close()
        trace("exec", "end of %r: %r", request.chain, connection.protocol.exit)
