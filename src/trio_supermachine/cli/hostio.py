"""The command line's own stdin, stdout and terminal.

These files belong to whoever started this program and may be shared with others: none is ever
made non-blocking, and a terminal is left as it was found.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import struct
import termios
import tty
from contextlib import suppress
from typing import Final, Self, final

import trio

from .._util.blocking import read_some, write_all
from ..programs.running import LAST_OUTPUT

_READ: Final = 64 * 1024


async def forward_input(fd: int, stdin: trio.abc.SendStream) -> None:
    """Send what can be read from ``fd`` to a program, until the end of either."""
    fd = os.dup(fd)  # a copy of its own: Trio lets one task wait for a descriptor
    try:
        while data := await _read(fd):
            await stdin.send_all(data)
        await stdin.aclose()
    except trio.BrokenResourceError:
        pass  # the program has closed its stdin, or has ended
    finally:
        os.close(fd)


async def _read(fd: int) -> bytes:
    try:
        return await read_some(fd, _READ)
    except OSError as exc:
        if exc.errno != errno.EIO:  # a terminal that has been hung up
            raise
        return b""


@final
class Output:
    """Copies a program's output to a host file as it comes."""

    def __init__(self, stream: trio.abc.ReceiveStream, fd: int) -> None:
        self._stream = stream
        self._fd = fd
        self._patience = math.inf
        self._receiving = trio.CancelScope()

    def program_ended(self) -> None:
        """Stop at the end of the stream, or once nothing has come for two seconds.

        What is on its way must not be lost, however slow the reader of the host file; but a
        process that the program left behind may hold the stream open for ever.
        """
        self._patience = LAST_OUTPUT
        self._receiving.deadline = trio.current_time() + LAST_OUTPUT

    async def copy(self) -> None:
        """Copy until the end. A reader that goes away closes the program's end too."""
        fd = os.dup(self._fd)
        try:
            while chunk := await self._receive():
                await write_all(fd, chunk)
        except BrokenPipeError:
            await self._stream.aclose()
        except trio.BrokenResourceError:
            pass  # the exec broke: waiting for the program tells why
        finally:
            os.close(fd)

    async def _receive(self) -> bytes | bytearray:
        with trio.move_on_after(self._patience) as self._receiving:
            return await self._stream.receive_some()
        return b""


@final
class RawTerminal:
    """A terminal that passes every key on as it is typed, Ctrl-C too, for the length of a block.

    It is as it was found on every way out of the block. One that has been hung up is left alone.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: Final = termios.tcgetattr(fd)

    def __enter__(self) -> Self:
        self.make_raw()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.restore()

    def make_raw(self) -> None:
        """Make it raw, unless it serves another program at the moment."""
        try:
            foreground = os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:  # not this session's terminal, so without job control
            foreground = True
        if foreground:
            with suppress(termios.error):
                # Not TCSAFLUSH, which would throw away what has been typed ahead.
                tty.setraw(self._fd, termios.TCSANOW)

    def restore(self) -> None:
        """Make it what it was."""
        with suppress(termios.error):
            termios.tcsetattr(self._fd, termios.TCSANOW, self._before)


def terminal_size(fd: int) -> tuple[int, int] | None:
    """Columns and rows of a terminal, or ``None`` if it has none to tell."""
    try:
        answer = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))
    except OSError:
        return None
    rows, columns, _, _ = struct.unpack("HHHH", answer)
    return (columns, rows) if columns and rows else None
