"""Programs running in a guest, as their users hold them: what :meth:`Vm.exec` gives.

:class:`ExecChild`, its streams and its :class:`ExecSignaler` are views of one
:class:`~.running.RunningExec`, which has all state.
"""

from __future__ import annotations

import errno as errno_names
import operator
import os
import signal as signals
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, final

import trio

from .._public import NoPublicConstructor, public
from .._util.conflict import OneAtATime
from ..agent.wire import StreamId
from .request import check_winsize
from .running import RunningExec

_MAX_SIGNAL: Final = 64


@final
class _StdinStream(trio.abc.SendStream):
    """The program's stdin."""

    def __init__(self, running: RunningExec) -> None:
        self._running = running
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
                    sent += await self._running.send_stdin(view[sent:])

    async def wait_send_all_might_not_block(self) -> None:
        with self._use:
            self._check_open()
            await trio.lowlevel.checkpoint()
            await self._running.stdin_ready()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("stdin is closed")

    async def aclose(self) -> None:
        """Close the program's stdin (a terminal gets Ctrl-D). Idempotent."""
        self._closed = True
        self._running.protocol.end_stdin()
        self._running.flush()
        await trio.lowlevel.checkpoint()


@final
class _OutputStream(trio.abc.ReceiveStream):
    """The program's stdout or stderr."""

    def __init__(self, running: RunningExec, stream: StreamId) -> None:
        self._running = running
        self._stream = stream
        self._closed = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be >= 1")
        running = self._running
        protocol = running.protocol
        with running.receiving[self._stream]:
            await trio.lowlevel.checkpoint()
            while True:
                if self._closed:
                    raise trio.ClosedResourceError(f"{self._stream.name.lower()} is closed")
                chunk = protocol.take(self._stream, max_bytes)
                if chunk is not None:
                    if protocol.has_outgoing:
                        running.flush()
                    return chunk
                await running.changed()

    async def aclose(self) -> None:
        """Close the reading end: the program's next write there gets SIGPIPE. Idempotent."""
        self._closed = True
        self._running.protocol.close_output(self._stream)
        self._running.flush()
        await trio.lowlevel.checkpoint()


@public
@final
class ExecSignaler(metaclass=NoPublicConstructor):
    """Sends signals to the program of an exec; :meth:`ExecChild.signaler` gives it.

    It may outlive the exec: after the program's end its calls do nothing.
    """

    _made_by = "ExecChild.signaler"

    def __init__(self, running: RunningExec) -> None:
        self._running = running

    def send_signal(self, signum: int) -> None:
        """Send a signal to the process, without waiting for the guest.

        :param signum: the signal's number, 1 to 64.
        :raises ValueError: there is no such signal.
        """
        _check_signal(signum)
        if self._running.protocol.exit is None and not self._running.over:
            self._running.protocol.signal(signum)
            self._running.flush()

    def terminate(self) -> None:
        """Send SIGTERM to the process, without waiting for the guest."""
        self.send_signal(signals.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the process; :meth:`ExecChild.abort` sends it to the whole group."""
        self.send_signal(signals.SIGKILL)

    async def signal(self, signum: int) -> None:
        """Send a signal to the process, and wait until the agent has acknowledged it.

        Cancelled, the signal may have been sent or not.

        :param signum: the signal's number, 1 to 64.
        :raises ValueError: there is no such signal.
        :raises VmExited: the VM ended first.
        :raises ExecEof: the agent's connection ended first.
        """
        await trio.lowlevel.checkpoint()
        _check_signal(signum)
        protocol = self._running.protocol
        if protocol.exit is not None:
            return
        sequence = protocol.signal(signum)
        self._running.flush()
        with protocol.awaited_ack(sequence):
            while sequence not in protocol.acks:
                if protocol.exit is not None:
                    return
                await self._running.changed()
            errno = protocol.acks[sequence]
        if errno not in (0, errno_names.ESRCH):
            raise OSError(errno, os.strerror(errno))


def _check_signal(signum: int) -> None:
    if not 1 <= signum <= _MAX_SIGNAL:
        raise ValueError(f"{signum} is not a signal number")


@public
@final
class ExecChild(metaclass=NoPublicConstructor):
    """A program running in a guest, much like a :class:`trio.Process`. :meth:`Vm.exec` makes it.

    :ivar stdin: a :class:`trio.abc.SendStream`, or ``None`` without ``stdin=True``.
    :ivar stdout: a :class:`trio.abc.ReceiveStream`.
    :ivar stderr: a :class:`trio.abc.ReceiveStream`, empty for a terminal.
    :ivar pid: the process id in the guest.
    :ivar args: the argument vector it was started with.

    Example::

        async with vm.exec(["cat"]) as child:
            await child.stdin.send_all(b"hello")
            await child.stdin.aclose()
            async for chunk in child.stdout:
                print(chunk)
    """

    _made_by = "Vm.exec"

    def __init__(self, running: RunningExec) -> None:
        assert running.protocol.pid is not None
        self._running = running
        self._signaler = ExecSignaler._create(running)
        self.args: list[str | bytes] = list(running.request.chain[0])
        self.pid: int = running.protocol.pid
        self.stdin: trio.abc.SendStream | None = None
        if running.has_stdin:
            self.stdin = _StdinStream(running)
        self.stdout: trio.abc.ReceiveStream = _OutputStream(running, StreamId.STDOUT)
        self.stderr: trio.abc.ReceiveStream = _OutputStream(running, StreamId.STDERR)

    def __repr__(self) -> str:
        status = "running" if self.returncode is None else f"exited with {self.returncode}"
        return f"<ExecChild {self.args!r} pid {self.pid}: {status}>"

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; ``None`` while it runs."""
        exit_ = self._running.protocol.exit
        return None if exit_ is None else exit_.returncode

    async def wait(self) -> int:
        """Wait until the program has ended, and give its :attr:`returncode`.

        Cancelling ends the waiting alone; leave the block to end the program.

        :raises VmExited: the VM ended first.
        :raises ExecEof: the agent's connection ended first.
        """
        await trio.lowlevel.checkpoint()
        return (await self._running.wait()).returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal to the process, without waiting; after its end do nothing.

        :param signum: the signal's number, 1 to 64.
        :raises ValueError: there is no such signal.
        """
        self._signaler.send_signal(signum)

    def terminate(self) -> None:
        """Send SIGTERM to the process, without waiting; after its end do nothing."""
        self._signaler.terminate()

    def kill(self) -> None:
        """Send SIGKILL to the process, without waiting; :meth:`abort` sends it to its group."""
        self._signaler.kill()

    async def signal(self, signum: int) -> None:
        """Send a signal and wait until the agent has acknowledged it; after its end do nothing.

        Cancelled, the signal may have been sent or not. Errors are those of
        :meth:`ExecSignaler.signal`.

        :param signum: the signal's number, 1 to 64.
        """
        await self._signaler.signal(signum)

    def signaler(self) -> ExecSignaler:
        """Give a handle that can only signal, and may outlive this block."""
        return self._signaler

    async def resize(self, cols: int, rows: int) -> None:
        """Set the size of the terminal; the program gets SIGWINCH.

        :param cols: columns, in characters.
        :param rows: rows, in characters.
        :raises ValueError: a size is not in 1..65535.
        """
        check_winsize(cols, rows)
        self._running.protocol.resize(cols, rows)
        self._running.flush()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Send SIGKILL to the whole process group, without waiting."""
        self._running.abort()


@asynccontextmanager
async def open_child(
    opening: AbstractAsyncContextManager[RunningExec],
) -> AsyncIterator[ExecChild]:
    """Give the public view of an exec that ``opening`` starts, for the length of its block."""
    async with opening as running:
        yield ExecChild._create(running)
