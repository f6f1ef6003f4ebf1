"""A command and all that it starts, as one thing that begins and ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

_TAIL: Final = 4000
_MAX_LINE: Final = 1 << 16

# The group's own watcher reads a pipe of which this program holds the other end: when this program
# is killed, the pipe ends, and the watcher kills what is left of the group.
_WATCHED: Final = (
    'exec 3<&0 </dev/null; { cat <&3; kill -KILL 0; } >/dev/null 2>&1 & exec 3<&-; exec "$@"'
)


class CommandFailed(Exception):
    """A command ended badly; ``said`` is the tail of its output."""

    def __init__(self, command: str, returncode: int, said: str) -> None:
        super().__init__(f"{command} ended with {returncode}: {said}")
        self.said = said


async def run_group(
    command: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    on_line: Callable[[str], Awaitable[None]] | None = None,
) -> None:
    """Run ``command``, in a session of its own, to its end.

    Cancellation, an exception of ``on_line`` and the death of this program kill all processes
    that it has started and that have not left its process group.

    :param on_line: is told each line that it writes to stdout or stderr.
    :raises CommandFailed: it did not exit with 0.
    """
    tail = b""
    async with _started(command, cwd, env) as process:
        assert process.stdout is not None
        line = b""
        async for chunk in process.stdout:
            tail = (tail + chunk)[-_TAIL:]
            *lines, line = (line + chunk).split(b"\n")
            line = line[-_MAX_LINE:]
            if on_line is not None:
                for complete in lines:
                    await on_line(complete.decode("utf-8", "replace"))
        await process.wait()
    if process.returncode:
        said = tail.decode("utf-8", "replace").strip()
        raise CommandFailed(command[0], process.returncode, said)


@asynccontextmanager
async def _started(
    command: Sequence[str], cwd: Path, env: Mapping[str, str]
) -> AsyncIterator[trio.Process]:
    process = await trio.lowlevel.open_process(
        ["/bin/sh", "-c", _WATCHED, "sh", *command],
        cwd=cwd,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process
    finally:
        # The group exists for as long as its watcher, also when the command has ended.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()
