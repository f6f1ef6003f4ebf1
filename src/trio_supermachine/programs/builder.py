"""Execs built step by step: what :meth:`Vm.exec_builder` gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeAlias, final

import attrs
import trio

from .._util.nursery import open_flat_nursery
from .._util.public import public
from ..agent.wire import ExecFlags, ExecRequest, StagedFile
from ..errors import ConfigError, ExecEof
from .child import ExecChild
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
from .run_process import LAST_OUTPUT, collect

OpenRequest: TypeAlias = Callable[[ExecRequest], AbstractAsyncContextManager[ExecChild]]


@public
@attrs.frozen(kw_only=True)
class ExecOutcome:
    """The result of a program that was run to its end."""

    #: The return code; negative for a signal.
    returncode: int
    stdout: bytes
    stderr: bytes
    #: Seconds from the start to the end, measured in the guest.
    duration: float
    #: Whether ``timeout`` ended it.
    timed_out: bool
    #: Whether the event of ``output_with_cancel`` ended it.
    cancelled: bool
    #: The largest resident set of the program and the children that it waited for.
    peak_rss_kib: int

    @property
    def success(self) -> bool:
        """Whether it ended by itself with return code 0."""
        return self.returncode == 0 and not self.timed_out and not self.cancelled


@public
@final
@attrs.frozen
class ExecBuilder:
    """An exec in the making. Immutable: every method gives a changed copy."""

    _open: OpenRequest = attrs.field(repr=False)
    _chain: tuple[tuple[StrOrBytes, ...], ...] = ()
    _environment: tuple[StrOrBytes, ...] = ()
    _cwd: StrOrBytes | None = None
    _user: str | None = None
    _tty: bool = False
    _winsize: tuple[int, int] | None = None
    _timeout: float | None = None
    _files: tuple[StagedFile, ...] = ()

    def argv(self, argv: Sequence[StrOrBytesPath]) -> ExecBuilder:
        """What to run. :raises ValueError: it is empty or holds NUL."""
        return attrs.evolve(self, chain=(tuple(command_argv(argv)), *self._chain[1:]))

    def chain(self, argv: Sequence[StrOrBytesPath]) -> ExecBuilder:
        """What to run next if all before it ended with 0, as ``&&`` in a shell, without a shell."""
        if not self._chain:
            raise ConfigError("chain() comes after argv()")
        return attrs.evolve(self, chain=(*self._chain, tuple(command_argv(argv))))

    def env(self, key: str, value: str) -> ExecBuilder:
        """Add a variable to the image's environment."""
        return attrs.evolve(self, environment=(*self._environment, env_entry(key, value)))

    def cwd(self, path: StrOrBytesPath) -> ExecBuilder:
        """The working directory; relative paths start at the image's."""
        return attrs.evolve(self, cwd=guest_path(path))

    def user(self, user: str | int) -> ExecBuilder:
        """A user's name or id, with an optional group: ``"app"``, ``"1234:1234"``, ``1234``."""
        return attrs.evolve(self, user=user_field(user))

    def tty(self, tty: bool = True) -> ExecBuilder:
        """Run it on a terminal of its own."""
        return attrs.evolve(self, tty=tty)

    def winsize(self, cols: int, rows: int) -> ExecBuilder:
        """The size of the terminal in characters."""
        return attrs.evolve(self, winsize=check_winsize(cols, rows))

    def timeout(self, seconds: float) -> ExecBuilder:
        """Kill the process group after ``seconds``, measured in the guest."""
        if not 0 < seconds < 0xFFFFFFFF / 1000:
            raise ConfigError(f"a timeout of {seconds!r} seconds is out of range")
        return attrs.evolve(self, timeout=seconds)

    def stage_file(self, path: StrOrBytesPath, data: bytes) -> ExecBuilder:
        """Write a file (mode 0644), atomically and in the same request, before it starts."""
        return self.stage_file_mode(path, data, 0o644)

    def stage_file_mode(self, path: StrOrBytesPath, data: bytes, mode: int) -> ExecBuilder:
        """The same with the file's mode."""
        check_no_nul(os.fspath(path))
        check_mode(mode)
        file = StagedFile(path=os.fspath(path), data=bytes(data), mode=mode)
        return attrs.evolve(self, files=(*self._files, file))

    def _request(self, flags: ExecFlags) -> ExecRequest:
        if not self._chain:
            raise ConfigError("nothing to run; call argv() first")
        return exec_request(
            self._chain,
            flags | (ExecFlags.TTY if self._tty else ExecFlags.NONE),
            extra_env=self._environment,
            cwd=self._cwd,
            user=self._user,
            winsize=self._winsize,
            timeout=self._timeout,
            files=self._files,
        )

    def spawn(self) -> AbstractAsyncContextManager[ExecChild]:
        """Start it: an async context manager giving :class:`ExecChild`, as :meth:`Vm.exec`."""
        return self._open(self._request(ExecFlags.STDIN))

    async def output(self) -> ExecOutcome:
        """Run it to its end with an empty stdin. Cancelling kills its process group.

        :raises OSError: it could not be started. :raises VmExited: the VM ended first.
        """
        return await self._run(None)

    async def output_with_cancel(self, event: trio.Event) -> ExecOutcome:
        """The same; when ``event`` is set the group is killed and the outcome is ``cancelled``."""
        return await self._run(event)

    async def output_resilient(self, retries: int) -> ExecOutcome:
        """The same; up to ``retries`` more tries while nothing was started.

        Only :exc:`ExecEof` with ``is_setup_failure`` is tried again: never what may have run.
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
        output: tuple[list[bytes | bytearray], list[bytes | bytearray]] = ([], [])
        cancelled = False
        async with self._open(self._request(ExecFlags.NONE)) as child:
            with trio.CancelScope() as collecting:
                async with open_flat_nursery() as nursery:
                    nursery.start_soon(collect, child.stdout, output[0])
                    nursery.start_soon(collect, child.stderr, output[1])
                    if event is not None:
                        cancelled = await _wait_or_abort(child, event)
                    await child.wait()
                    assert child.exit is not None
                    if cancelled or child.exit.timed_out:
                        collecting.deadline = trio.current_time() + LAST_OUTPUT
        exit_ = child.exit
        assert exit_ is not None
        return ExecOutcome(
            returncode=exit_.returncode,
            stdout=b"".join(output[0]),
            stderr=b"".join(output[1]),
            duration=exit_.duration,
            timed_out=exit_.timed_out,
            cancelled=cancelled,
            peak_rss_kib=exit_.peak_rss_kib,
        )


async def _wait_or_abort(child: ExecChild, event: trio.Event) -> bool:
    """Wait for the end of ``child``; if ``event`` comes first, abort it and say so."""
    aborted = False

    async def abort_on_event() -> None:
        nonlocal aborted
        await event.wait()
        aborted = True
        child.abort()

    async with open_flat_nursery() as nursery:
        nursery.start_soon(abort_on_event)
        await child.wait()
        nursery.cancel_scope.cancel()
    return aborted
