"""The call :meth:`Vm.run_process`: :func:`trio.run_process`, with the process in a guest.

What is not captured is copied to files of the host, which the process would have inherited there.
Most programs are fed nothing and print nothing that is not captured, and cost no task. Only stdin,
or output for a host file, starts some.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import AbstractAsyncContextManager, suppress
from typing import Protocol, TypeAlias

import trio

from .._util.blocking import write_all
from .._util.nursery import open_flat_nursery
from ..agent.wire import ExecFlags, StreamId
from .child import ExecChild
from .request import Command, StrOrBytes, command_argv
from .running import LAST_OUTPUT, Captured, RunningExec


class HasFileno(Protocol):
    """An open host file."""

    def fileno(self) -> int: ...


OutputTarget: TypeAlias = int | HasFileno | None


class OpenExec(Protocol):
    """A function that starts the exec of a call, for the length of a block."""

    def __call__(
        self, argv: list[StrOrBytes], flags: ExecFlags, empty_stdin: bool
    ) -> AbstractAsyncContextManager[RunningExec]: ...


async def run_process(
    open_exec: OpenExec,
    command: Command,
    *,
    stdin: bytes | bytearray | memoryview | int,
    capture_stdout: bool,
    capture_stderr: bool,
    check: bool,
    stdout: OutputTarget,
    stderr: OutputTarget,
    shell: bool,
    task_status: trio.TaskStatus[ExecChild],
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end as :meth:`Vm.run_process` says."""
    argv = command_argv(command, shell=shell)
    if capture_stdout and stdout is not None:
        raise ValueError("can't specify both stdout and capture_stdout")
    if capture_stderr and stderr is not None:
        raise ValueError("can't specify both stderr and capture_stderr")
    stdout = subprocess.PIPE if capture_stdout else stdout
    stderr = subprocess.PIPE if capture_stderr else stderr
    _check_stdin(stdin)
    if task_status is trio.TASK_STATUS_IGNORED:
        _refuse_pipes(
            stdin=stdin,
            stdout=None if capture_stdout else stdout,
            stderr=None if capture_stderr else stderr,
        )

    feeding = not isinstance(stdin, int) and len(stdin) > 0
    empty_stdin = not isinstance(stdin, int) and not feeding
    out: list[bytes | bytearray] = []
    err: list[bytes | bytearray] = []
    captured: list[tuple[StreamId, list[bytes | bytearray]]] = []
    hosted: dict[StreamId, int] = {}
    for stream, capture, chunks, target in (
        (StreamId.STDOUT, capture_stdout, out, stdout),
        (StreamId.STDERR, capture_stderr, err, stderr),
    ):
        if capture:
            captured.append((stream, chunks))
        elif target is None:
            hosted[stream] = int(stream)
        elif not isinstance(target, int):
            hosted[stream] = target.fileno()
        elif target >= 0:
            hosted[stream] = target
    async with open_exec(argv, _flags(stdin, stdout, stderr), empty_stdin) as running:
        child = ExecChild._create(running)
        outputs = {StreamId.STDOUT: child.stdout, StreamId.STDERR: child.stderr}
        feed = child.stdin if feeding else None
        if stdin != subprocess.PIPE:
            child.stdin = None
        task_status.started(child)
        if feed is not None or not await running.collect(captured, tuple(hosted)):
            with trio.CancelScope() as copying:
                async with open_flat_nursery() as nursery:
                    if feed is not None:
                        assert not isinstance(stdin, int)
                        nursery.start_soon(_feed, feed, stdin)
                    if captured:
                        nursery.start_soon(_collect, running, captured)
                    for stream, fd in hosted.items():
                        nursery.start_soon(_copy_to_host, outputs[stream], fd)
                    await running.wait()
                    if not captured:
                        # A process on the host would have written its output itself by now.
                        # Here some may be under way, but a descendant may also hold the pipe
                        # open for long.
                        running.abort()
                        copying.deadline = trio.current_time() + LAST_OUTPUT
        returncode = (await running.wait()).returncode
    output = b"".join(out) if capture_stdout else None
    errors = b"".join(err) if capture_stderr else None
    if check and returncode:
        raise subprocess.CalledProcessError(returncode, command, output=output, stderr=errors)
    return subprocess.CompletedProcess(command, returncode, output, errors)


def _check_stdin(stdin: object) -> None:
    if isinstance(stdin, str):
        raise UnicodeError("process stdin must be bytes, not str")
    if isinstance(stdin, (bytes, bytearray, memoryview)):
        return
    if stdin not in (subprocess.PIPE, subprocess.DEVNULL):
        raise ValueError("stdin must be bytes, subprocess.PIPE or subprocess.DEVNULL")


def _refuse_pipes(**targets: object) -> None:
    for name, target in targets.items():
        if isinstance(target, int) and target == subprocess.PIPE:
            raise ValueError(
                f"{name}=subprocess.PIPE is only valid with nursery.start, "
                "since that's the only way to access the pipe"
            )


def _flags(stdin: object, stdout: OutputTarget, stderr: OutputTarget) -> ExecFlags:
    flags = ExecFlags.NONE
    if stdin != subprocess.DEVNULL:
        flags |= ExecFlags.STDIN
    if stdout == subprocess.DEVNULL:
        flags |= ExecFlags.NULL_STDOUT
    if stderr == subprocess.DEVNULL:
        flags |= ExecFlags.NULL_STDERR
    elif stderr == subprocess.STDOUT:
        flags |= ExecFlags.STDERR_TO_STDOUT
    return flags


# A broken exec breaks all of its streams at once. The tasks below say nothing of it: the one that
# waits for the program's end raises the reason.


async def _feed(stream: trio.abc.SendStream, data: bytes | bytearray | memoryview) -> None:
    with suppress(trio.BrokenResourceError):
        await stream.send_all(data)
    await stream.aclose()


async def _collect(running: RunningExec, captured: Captured) -> None:
    with suppress(trio.BrokenResourceError):
        await running.collect(captured)


async def _copy_to_host(stream: trio.abc.ReceiveStream, fd: int) -> None:
    # Trio lets one task wait for a descriptor, and two calls may write to the same file.
    fd = os.dup(fd)
    try:
        async for chunk in stream:
            await write_all(fd, chunk)
    except trio.BrokenResourceError:
        pass
    except BrokenPipeError:
        await stream.aclose()  # the program gets SIGPIPE, as it would on the host
    finally:
        os.close(fd)
