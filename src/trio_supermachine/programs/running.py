"""One exec that runs: its connection with the agent, and who waits for what on it.

:class:`RunningExec` is to :class:`ExecChild` what ``RunningVm`` is to :class:`Vm`: the state that
the public object, its streams and its signaler look at. What the frames mean is decided without
I/O, in :class:`~.agent.execution.ExecProtocol`; here bytes are moved and tasks are woken.

No task belongs to an exec. The task that moves the machine's packets calls :meth:`_take_in`
whenever bytes have come, and that wakes every waiter, each of which looks at the protocol again.
What is to be said leaves in the call that has it said, or, when the connection has no room, in
the next :meth:`_take_in` that finds some.

An exec ends in one of these ways:

- *The block of* :func:`open_exec` *is left.* Its stdin is closed, its output is discarded, and the
  block waits for the program's end. The agent then closes the connection.
- *The block is left by an exception or a cancellation.* SIGKILL goes to the process group first;
  the block waits, shielded, until the guest confirms it, for 2 s at most. A guest that confirms
  nothing (paused, hostile, overloaded) cannot hold the caller longer.
- *The connection ends early*: the machine has ended (:exc:`VmExited`), the agent has ended or
  breaks the protocol (:exc:`ExecEof`). All waiters raise that.

Whatever the way, the connection is closed at the end, upon which the agent kills what is left of
the process group. Nothing that the guest sends makes this side hold more than the windows that it
granted.
"""

from __future__ import annotations

import signal as signals
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Final, TypeAlias, final

import attrs
import trio

from .._util.conflict import OneAtATime
from .._util.trace import trace
from ..agent import wire
from ..agent.client import AgentClient, guest_os_error
from ..agent.execution import ExecProtocol
from ..agent.wire import ExecFlags, ExecRequest, Exit, GuestError, StreamId, WireError
from ..vsock.stream import VsockStream

#: Seconds to wait for the last output of a program that has ended, where a process that has left
#: its group may hold the pipes open for ever.
LAST_OUTPUT: Final = 2.0

_KILL_CONFIRMATION: Final = 2.0  # seconds: the longest that a cancellation waits for the guest

# Plain integers: the members' own operators are slow.
_STDIN: Final = int(ExecFlags.STDIN | ExecFlags.TTY)
_NULL_STDOUT: Final = int(ExecFlags.NULL_STDOUT)
_NO_STDERR: Final = int(ExecFlags.TTY | ExecFlags.NULL_STDERR | ExecFlags.STDERR_TO_STDOUT)

#: Streams, and where to put what comes from each.
Captured: TypeAlias = Sequence[tuple[StreamId, list[bytes | bytearray]]]


@final
class RunningExec:
    """The state of one exec. :func:`open_exec` makes it.

    :ivar request: what it was started with.
    :ivar protocol: what the frames have said so far.
    :ivar receiving: for each output, the guard that lets one task receive at a time.
    """

    def __init__(self, client: AgentClient, stream: VsockStream, request: ExecRequest) -> None:
        flags = int(request.flags)
        outputs = []
        if not flags & _NULL_STDOUT:
            outputs.append(StreamId.STDOUT)
        if not flags & _NO_STDERR:
            outputs.append(StreamId.STDERR)
        self.request = request
        self.has_stdin: bool = bool(flags & _STDIN) and not request.empty_stdin
        self.protocol: ExecProtocol = ExecProtocol(
            request.window, outputs=tuple(outputs), stdin=self.has_stdin
        )
        self.receiving: dict[StreamId, OneAtATime] = {
            output: OneAtATime(f"another task is already receiving from this {output.name.lower()}")
            for output in (StreamId.STDOUT, StreamId.STDERR)
        }
        self._client = client
        self._stream = stream
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
        """Send what the protocol has to say, now or when there is room; wake all waiters."""
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
        """Send some of ``data``, and give how much. A cancelled call has sent nothing."""
        await self.stdin_ready()
        size = min(len(data), self.protocol.stdin_credit, wire.MAX_DATA)
        self._stream.send_nowait(self.protocol.stdin_data(data[:size]))
        return size

    async def wait_started(self) -> None:
        """Wait until the program runs. :raises OSError: it could not be started."""
        while self.protocol.pid is None:
            if self.protocol.error is not None:
                at_cwd = self.protocol.error.value == wire.FAILED_AT_CWD
                failed = self.request.cwd if at_cwd else self.request.chain[0][0]
                raise guest_os_error(_explained(self.protocol.error), failed)
            await self.changed()

    async def wait(self) -> Exit:
        """Wait until the program has ended, and give its end."""
        while self.protocol.exit is None:
            await self.changed()
        return self.protocol.exit

    async def collect(
        self,
        captured: Captured,
        others: Sequence[StreamId] = (),
        *,
        until_exit: bool = False,
    ) -> bool:
        """Move output into ``captured`` until the program and all its output have ended.

        Needs no task. It returns earlier, and gives false, when one of ``others`` has output; and
        when the program has ended but not all of its output, if ``until_exit`` is true or nothing
        is captured.
        """
        protocol = self.protocol
        streams = (*(stream for stream, _ in captured), *others)
        with ExitStack() as uses:
            for stream, _ in captured:
                uses.enter_context(self.receiving[stream])
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
                    if until_exit or not captured:
                        return False
                await self.changed()

    def abort(self) -> None:
        """Send SIGKILL to the whole process group, without waiting."""
        if not self.over:
            self.protocol.signal(signals.SIGKILL, group=True)
            self.flush()

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


@asynccontextmanager
async def open_exec(client: AgentClient, request: ExecRequest) -> AsyncIterator[RunningExec]:
    """Start a program: a block, entered when it runs, and left as the module's head says.

    :raises OSError: it could not be started.
    """
    trace("exec", "start %r", request.chain)
    try:
        stream = await client.ask(b"".join(request.encode()))
    except (trio.BrokenResourceError, WireError) as exc:
        raise await client.failure(exc, "an exec", setup=True) from exc
    running = RunningExec(client, stream, request)
    try:
        try:
            running.start()
            await running.wait_started()
            yield running
            await running.drain()
        except BaseException:
            await running.kill()
            raise
    finally:
        running.close()
        trace("exec", "end of %r: %r", request.chain, running.protocol.exit)


def _explained(error: GuestError) -> GuestError:
    """Say whose the users and groups are, of which the guest found none."""
    what, _, name = error.message.partition(": ")
    if what not in ("no such user", "no such group"):
        return error
    return attrs.evolve(error, message=f"the image has no {what.removeprefix('no such ')} {name!r}")
