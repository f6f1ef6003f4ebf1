"""Commands with all the processes that they start: a group that begins and ends as one.

The group has a watcher, a shell that reads a pipe. This program holds the other end of the pipe,
so the pipe ends when this program is killed. Then the watcher kills the group, itself included.
"""

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

_WATCHED: Final = (
    'exec 3<&0 </dev/null; { cat <&3; kill -KILL 0; } >/dev/null 2>&1 & exec 3<&-; exec "$@"'
)


class CommandFailed(Exception):
    """A command did not exit with 0.

    :ivar said: the tail of its output.
    """

    def __init__(self, command: str, returncode: int, said: str) -> None:
        super().__init__(f"{command} ended with {returncode}: {said}")
        self.said = said


async def run_group(
    command: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    on_line: Callable[[str], Awaitable[None]] | None = None,
) -> None:
    """Run ``command`` to its end, in a session of its own.

    Cancellation, an exception of ``on_line`` and the death of this program kill all processes of
    the command, but for those that have left its process group.

    :param on_line: is awaited with each line that the command writes to stdout or stderr.
    :raises CommandFailed: the command did not exit with 0.
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
        # The watcher keeps the group in existence after the command has ended.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()
