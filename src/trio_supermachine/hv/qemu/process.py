"""The engine's operating system process: started, watched and reaped without a thread.

Theory of operation. No QEMU may outlive this program, even if it is killed with -9. So a helper
program, ``launcher run PARENT PROGRAM ARGS...``, first asks the kernel to kill the process when its
parent *thread* ends, and then becomes QEMU. The parent must be the thread that runs Trio, which
outlives every machine. Trio's own process functions will not do: they spawn from worker threads,
which end when they have been idle for a while.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, final

import trio

#: Seconds that a killed process may take to be gone. Only a stuck kernel needs more.
REAP_TIMEOUT: Final = 5.0

_STDERR_KEPT: Final = 8 * 1024
# A QEMU outside the system's directories may need these to find its libraries and modules.
_PASSED_ON: Final = ("LD_LIBRARY_PATH", "QEMU_MODULE_DIR")


@final
class EngineProcess:
    """A running process. :func:`engine_process` makes one."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._stderr: trio.lowlevel.FdStream | None = None
        self._said = bytearray()

    @property
    def pid(self) -> int:
        """Process id; while the process has not been waited for, no other process gets it."""
        assert self._popen is not None
        return self._popen.pid

    @property
    def stderr_tail(self) -> str:
        """End of its output to stderr, for people."""
        return self._said.decode("utf-8", "replace").strip()

    def kill(self) -> None:
        """Send SIGKILL. Plain and idempotent."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for its end; give the exit status, negative for a signal. For one task."""
        assert self._popen is not None
        while (status := self._popen.poll()) is None:
            await trio.lowlevel.wait_readable(self._pidfd)
        return status

    async def drain_stderr(self) -> None:
        """Read its stderr to the end, keeping the last 8 KiB."""
        assert self._stderr is not None
        async for chunk in self._stderr:
            self._said += chunk
            del self._said[:-_STDERR_KEPT]

    # A KeyboardInterrupt in the middle of this would lose a process.
    @trio.lowlevel.enable_ki_protection
    def _start(self, argv: Sequence[bytes], pass_fds: Sequence[int]) -> None:
        environment = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        reading, writing = os.pipe()
        try:
            self._stderr = trio.lowlevel.FdStream(reading)
            self._popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=writing,
                cwd="/",
                env=environment,
                pass_fds=pass_fds,
                start_new_session=True,  # the terminal's Ctrl-C is for the host program alone
            )
            self._pidfd = os.pidfd_open(self._popen.pid)
        finally:
            os.close(writing)

    async def _end(self) -> None:
        with trio.move_on_after(REAP_TIMEOUT, shield=True):
            if self._popen is not None:
                if self._pidfd >= 0:
                    self.kill()
                    await self.wait()
                else:  # no descriptor was left to watch it by
                    self._popen.kill()
                    self._popen.wait()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._stderr is not None:
            with trio.CancelScope(shield=True):
                await self._stderr.aclose()


@asynccontextmanager
async def engine_process(
    launcher: Path, argv: Sequence[bytes], pass_fds: Sequence[int], *, lean: bool = False
) -> AsyncIterator[EngineProcess]:
    """Run ``argv``, an absolute path and its arguments, for a block; kill it by SIGKILL at the end.

    :param lean: spend no memory on huge pages.
    :raises OSError: the launcher could not be started, or no descriptors are left.
    """
    process = EngineProcess()
    word = b"run-lean" if lean else b"run"
    command = [os.fsencode(launcher), word, str(os.getpid()).encode(), *argv]
    try:
        process._start(command, pass_fds)
        yield process
    finally:
        await process._end()
