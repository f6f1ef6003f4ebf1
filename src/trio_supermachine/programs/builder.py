"""Execs built step by step: what :meth:`Vm.exec_builder` gives."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeAlias, final

import attrs
import trio

from .._public import NoPublicConstructor, public
from .._util.nursery import open_flat_nursery
from ..agent.wire import ExecFlags, ExecRequest, StagedFile, StreamId
from ..errors import ConfigError, ExecEof
from .child import ExecChild, open_child
from .request import (
    StrOrBytes,
    StrOrBytesPath,
    check_mode,
    check_no_nul,
    check_winsize,
    command_argv,
    env_entry,
    exec_request,
    guest_path,
    user_field,
)
from .running import LAST_OUTPUT, Captured, RunningExec

#: Starts the exec of a request, for the length of a block.
OpenExec: TypeAlias = Callable[[ExecRequest], AbstractAsyncContextManager[RunningExec]]


@public
@attrs.frozen(kw_only=True)
class ExecOutcome:
    """The result of a program that was run to its end.

    :ivar returncode: the return code, negative for a signal.
    :ivar stdout: all that it wrote there.
    :ivar stderr: all that it wrote there; empty for a terminal.
    :ivar duration: seconds from its start to its end, measured in the guest.
    :ivar timed_out: :meth:`ExecBuilder.timeout` ended it.
    :ivar cancelled: the event of :meth:`ExecBuilder.output_with_cancel` ended it.
    :ivar peak_rss_kib: the largest resident set, in KiB, of the program and the children that it
        waited for.
    """

    returncode: int
    stdout: bytes
    stderr: bytes
    duration: float
    timed_out: bool
    cancelled: bool
    peak_rss_kib: int

    @property
    def success(self) -> bool:
        """Whether it ended by itself with return code 0."""
        return self.returncode == 0 and not self.timed_out and not self.cancelled


@attrs.frozen(kw_only=True)
class _Spec:
    """The settings of a builder."""

    chain: tuple[tuple[StrOrBytes, ...], ...] = ()
    environment: tuple[StrOrBytes, ...] = ()
    cwd: StrOrBytes | None = None
    user: str | None = None
    tty: bool = False
    winsize: tuple[int, int] | None = None
    timeout: float | None = None
    files: tuple[StagedFile, ...] = ()

    def request(self, flags: ExecFlags) -> ExecRequest:
        """Make the request. :raises ConfigError: there is nothing to run."""
        if not self.chain:
            raise ConfigError("nothing to run; call argv() first")
        return exec_request(
            self.chain,
            flags | (ExecFlags.TTY if self.tty else ExecFlags.NONE),
            extra_env=self.environment,
            cwd=self.cwd,
            user=self.user,
            winsize=self.winsize,
            timeout=self.timeout,
            files=self.files,
        )


@public
@final
@attrs.frozen(repr=False)
class ExecBuilder(metaclass=NoPublicConstructor):
    """An exec in the making; :meth:`Vm.exec_builder` makes it.

    It never changes: each method returns a changed copy.

    Example::

        outcome = await vm.exec_builder().argv(["sh", "-c", "echo $A"]).env("A", "1").output()
        print(outcome.stdout, outcome.duration)
    """

    _made_by = "Vm.exec_builder"

    _open_exec: OpenExec
    _spec: _Spec = attrs.field(factory=_Spec)

    def __repr__(self) -> str:
        return f"<ExecBuilder of {[list(argv) for argv in self._spec.chain]!r}>"

    def _with(self, **changes: Any) -> ExecBuilder:
        return ExecBuilder._create(self._open_exec, attrs.evolve(self._spec, **changes))

    def argv(self, argv: Sequence[StrOrBytesPath]) -> ExecBuilder:
        """Set what to run.

        :param argv: the program and its arguments; it is looked up in ``PATH`` without a slash.
        :raises ValueError: it is empty or holds NUL.
        """
        return self._with(chain=(tuple(command_argv(argv)), *self._spec.chain[1:]))

    def chain(self, argv: Sequence[StrOrBytesPath]) -> ExecBuilder:
        """Add what to run next if all before it ended with 0, as ``&&`` does in a shell.

        There is no shell in between.

        :param argv: the program and its arguments.
        :raises ConfigError: :meth:`argv` was not called before.
        :raises ValueError: it is empty or holds NUL.
        """
        if not self._spec.chain:
            raise ConfigError("chain() comes after argv()")
        return self._with(chain=(*self._spec.chain, tuple(command_argv(argv))))

    def env(self, key: str, value: str) -> ExecBuilder:
        """Add a variable to the image's environment.

        :param key: its name.
        :param value: its value.
        :raises ValueError: the name is empty or holds ``=``, or one of them holds NUL.
        """
        return self._with(environment=(*self._spec.environment, env_entry(key, value)))

    def cwd(self, path: StrOrBytesPath) -> ExecBuilder:
        """Set the working directory.

        :param path: a directory in the guest; relative paths start at the image's own, which ``""``
            is, too.
        :raises ValueError: it holds NUL.
        """
        return self._with(cwd=guest_path(path) if os.fspath(path) else None)

    def user(self, user: str | int) -> ExecBuilder:
        """Set the user.

        :param user: a name or an id, with an optional group: ``"app"``, ``"1234:1234"``, ``1234``.
        :raises ValueError: it is negative, empty, or holds NUL.
        """
        return self._with(user=user_field(user))

    def tty(self, tty: bool = True) -> ExecBuilder:
        """Run it on a terminal of its own; then ``stderr`` is empty.

        :param tty: whether it has one.
        """
        return self._with(tty=tty)

    def winsize(self, cols: int, rows: int) -> ExecBuilder:
        """Set the size of the terminal.

        :param cols: columns, in characters.
        :param rows: rows, in characters.
        :raises ValueError: a size is not in 1..65535.
        """
        return self._with(winsize=check_winsize(cols, rows))

    def timeout(self, seconds: float) -> ExecBuilder:
        """Kill the process group after ``seconds``, measured in the guest.

        :param seconds: from the program's start.
        :raises ConfigError: it is not above 0, or beyond 49 days.
        """
        if not 0 < seconds < 0xFFFFFFFF / 1000:
            raise ConfigError(f"a timeout of {seconds!r} seconds is out of range")
        return self._with(timeout=seconds)

    def stage_file(self, path: StrOrBytesPath, data: bytes) -> ExecBuilder:
        """Write a file with mode 0644 before the program starts: see :meth:`stage_file_mode`.

        :param path: where to; relative paths start at the working directory.
        :param data: the file's content.
        """
        return self.stage_file_mode(path, data, 0o644)

    def stage_file_mode(self, path: StrOrBytesPath, data: bytes, mode: int) -> ExecBuilder:
        """Write a file in the guest, atomically and in the same request, before it starts.

        :param path: where to; relative paths start at the working directory.
        :param data: the file's content.
        :param mode: its permissions, such as ``0o755``.
        :raises ValueError: the mode is none, or the path holds NUL.
        """
        check_no_nul(os.fspath(path))
        check_mode(mode)
        file = StagedFile(path=os.fspath(path), data=bytes(data), mode=mode)
        return self._with(files=(*self._spec.files, file))

    def spawn(self) -> AbstractAsyncContextManager[ExecChild]:
        """Start it: an async context manager giving :class:`ExecChild`, as :meth:`Vm.exec`.

        :raises ConfigError: :meth:`argv` was not called.
        :raises OSError: on entry: it could not be started.
        """
        return open_child(self._open_exec(self._spec.request(ExecFlags.STDIN)))

    async def output(self) -> ExecOutcome:
        """Run it to its end with an empty stdin, and give what became of it.

        Cancelled, it kills the process group, and waits, shielded and bounded, until the guest
        confirms that.

        :raises ConfigError: :meth:`argv` was not called.
        :raises OSError: it could not be started.
        :raises VmExited: the VM ended first.
        :raises ExecEof: the agent's connection ended first.
        """
        return await self._run(None)

    async def output_with_cancel(self, event: trio.Event) -> ExecOutcome:
        """Run it as :meth:`output` does, and end it when ``event`` is set.

        Then the process group is killed, and the outcome is ``cancelled``.

        :param event: what another task sets.
        """
        return await self._run(event)

    async def output_resilient(self, retries: int) -> ExecOutcome:
        """Run it as :meth:`output` does, and try again while nothing was started.

        Only :exc:`ExecEof` with ``is_setup_failure`` is tried again: never what may have run.

        :param retries: how many more tries there are.
        """
        if retries < 0:
            raise ValueError("retries must be >= 0")
        while True:
            try:
                return await self._run(None)
            except ExecEof as exc:
                if not exc.is_setup_failure or not retries:
                    raise
                retries -= 1

    async def _run(self, event: trio.Event | None) -> ExecOutcome:
        out: list[bytes | bytearray] = []
        err: list[bytes | bytearray] = []
        captured = ((StreamId.STDOUT, out), (StreamId.STDERR, err))
        cancelled = False
        async with self._open_exec(self._spec.request(ExecFlags.NONE)) as running:
            if event is None:
                await running.collect(captured, until_exit=True)
            else:
                cancelled = await _collect_or_abort(running, captured, event)
            exit_ = await running.wait()
            # A program that was killed may have left others behind, which hold its pipes open.
            bounded = cancelled or exit_.timed_out
            # The end of the VM takes these along, and not what is known of the program.
            with (
                suppress(trio.BrokenResourceError),
                trio.move_on_after(LAST_OUTPUT if bounded else math.inf),
            ):
                await running.collect(captured)
        return ExecOutcome(
            returncode=exit_.returncode,
            stdout=b"".join(out),
            stderr=b"".join(err),
            duration=exit_.duration,
            timed_out=exit_.timed_out,
            cancelled=cancelled,
            peak_rss_kib=exit_.peak_rss_kib,
        )


async def _collect_or_abort(running: RunningExec, captured: Captured, event: trio.Event) -> bool:
    """Collect until the program ends. If ``event`` comes first, abort it and give true."""
    aborted = False

    async def abort_on_event() -> None:
        nonlocal aborted
        await event.wait()
        aborted = True
        running.abort()

    async with open_flat_nursery() as nursery:
        nursery.start_soon(abort_on_event)
        await trio.lowlevel.checkpoint()  # an event that was set before counts, too
        await running.collect(captured, until_exit=True)
        nursery.cancel_scope.cancel()
    return aborted
