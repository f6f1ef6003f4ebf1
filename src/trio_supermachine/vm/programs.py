"""The calls of a VM that run programs in the guest."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

import trio

from .._util.block import Block
from ..agent import wire
from ..agent.wire import ExecFlags
from ..programs.builder import ExecBuilder
from ..programs.child import ExecChild, open_child
from ..programs.request import Command, Environment, StrOrBytesPath, command_argv, exec_request
from ..programs.run_process import OutputTarget, run_process
from ..programs.running import RunningExec
from .running import RunningVm


class GuestPrograms:
    """The calls of :class:`Vm` that run programs in the guest."""

    _running: RunningVm

    def exec(
        self,
        argv: Sequence[StrOrBytesPath],
        *,
        env: Environment | None = None,
        cwd: StrOrBytesPath | None = None,
        user: str | int | None = None,
        tty: bool = False,
        winsize: tuple[int, int] | None = None,
        stdin: bool = True,
    ) -> AbstractAsyncContextManager[ExecChild]:
        """Run a program: an async context manager giving an :class:`ExecChild`.

        Leaving the block normally closes its stdin, discards unread output and waits for its
        end. Leaving it by an exception or a cancellation kills its process group first.

        :param argv: the program and its arguments; looked up in ``PATH`` without a slash.
        :param env: its whole environment, as for :class:`subprocess.Popen`; ``None`` is the
            image's. (:meth:`ExecBuilder.env` adds to the image's.)
        :param cwd: its working directory, from the image's; ``None`` is the image's.
        :param user: name or id with an optional group (``"app"``, ``"1234:1234"``, ``1234``).
        :param tty: give it a terminal; then ``stderr`` is empty.
        :param winsize: columns and rows of the terminal, in characters.
        :param stdin: give it a pipe as its stdin, instead of ``/dev/null``.
        :raises ValueError: ``argv`` is empty, or something holds NUL.
        :raises OSError: it could not be started (:exc:`FileNotFoundError` and so on), on entry.
        """
        flags = ExecFlags.NONE
        if stdin:
            flags |= ExecFlags.STDIN
        if tty:
            flags |= ExecFlags.TTY
        request = exec_request(
            [command_argv(argv)], flags, env=env, cwd=cwd, user=user, winsize=winsize
        )
        return Block(open_child(self._running.open_exec(request)), "vm.exec(argv) as child")

    def exec_builder(self) -> ExecBuilder:
        """Give an empty :class:`ExecBuilder`, to describe an exec step by step."""
        return ExecBuilder._create(self._running.open_exec)

    async def run_process(
        self,
        command: Command,
        *,
        stdin: bytes | bytearray | memoryview | int = b"",
        capture_stdout: bool = False,
        capture_stderr: bool = False,
        check: bool = True,
        stdout: OutputTarget = None,
        stderr: OutputTarget = None,
        env: Environment | None = None,
        cwd: StrOrBytesPath | None = None,
        user: str | int | None = None,
        shell: bool = False,
        task_status: trio.TaskStatus[ExecChild] = trio.TASK_STATUS_IGNORED,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program to its end, as :func:`trio.run_process` does on the host.

        With ``await nursery.start(vm.run_process, ...)`` it hands out the :class:`ExecChild`, and
        ``subprocess.PIPE`` may be given. What is not captured goes to the host's own stdout and
        stderr, to an open host file given as ``stdout`` or ``stderr``, or nowhere
        (``subprocess.DEVNULL``).

        Cancelling it kills the process group in the guest, with SIGKILL, and waits, shielded and
        for 2 s at most, until that is confirmed.

        :param command: the program and its arguments; looked up in ``PATH`` without a slash.
        :param stdin: its input, ``subprocess.PIPE`` or ``subprocess.DEVNULL``.
        :param capture_stdout: give its output in the result.
        :param capture_stderr: give its errors in the result.
        :param check: raise an error when it does not return 0.
        :param stdout: an open host file, or ``subprocess.DEVNULL``; ``None`` is the host's stdout.
        :param stderr: the same for its errors, or ``subprocess.STDOUT``.
        :param env: its whole environment; ``None`` is the image's.
        :param cwd: its working directory, from the image's; ``None`` is the image's.
        :param user: name or id with an optional group.
        :param shell: ``command`` is a string for the guest's ``/bin/sh``.
        :param task_status: what ``nursery.start`` gives.
        :raises subprocess.CalledProcessError: ``check`` is true and it did not return 0.
        :raises OSError: it could not be started.
        :raises VmExited: the VM ended first.
        :raises ExecEof: the agent's connection ended first.
        """

        def open_exec(
            argv: Sequence[str | bytes], flags: ExecFlags, empty_stdin: bool
        ) -> AbstractAsyncContextManager[RunningExec]:
            request = exec_request(
                [argv], flags, env=env, cwd=cwd, user=user, empty_stdin=empty_stdin
            )
            return self._running.open_exec(request)

        return await run_process(
            open_exec,
            command,
            stdin=stdin,
            capture_stdout=capture_stdout,
            capture_stderr=capture_stderr,
            check=check,
            stdout=stdout,
            stderr=stderr,
            shell=shell,
            task_status=task_status,
        )

    async def workload_signal(self, signum: int) -> None:
        """Send a signal to the image's workload.

        Cancelled, it may have sent it or not.

        :param signum: the signal's number, such as ``signal.SIGHUP``.
        :raises ProcessLookupError: there is none, or it has ended.
        :raises VmExited: the VM has ended.
        """
        await self._running.client.call(wire.workload_signal(signum))

    async def wait_workload(self) -> int:
        """Wait for the end of the image's workload; give its return code, negative for a signal.

        127 and 126 mean that it could not be started, as in a shell; the console says why.
        Cancelled, it leaves the workload running. Any number of tasks may wait.

        :raises ProcessLookupError: the image has none.
        :raises VmExited: the VM has ended.
        """
        return await self._running.wait_workload()
