"""Reads and writes of host files that may be blocking ones, cancellably.

Such a file belongs to whoever opened it, and may be shared with other programs: it is never made
non-blocking. Trio waits until it is ready. Regular files cannot be polled (``EPERM``): they are
always ready.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Final

import trio

# A write of at most PIPE_BUF bytes to a pipe that polls as writable does not block.
_PIPE_BUF: Final = 4096


async def read_some(fd: int, size: int) -> bytes:
    """Read at most ``size`` bytes; ``b""`` is the end of the file."""
    await _ready(trio.lowlevel.wait_readable, fd)
    return os.read(fd, size)


async def write_all(fd: int, data: bytes | bytearray) -> None:
    """Write all of ``data``. Cancelled, some of it may have been written."""
    view = memoryview(data)
    while view:
        polls = await _ready(trio.lowlevel.wait_writable, fd)
        view = view[os.write(fd, view[:_PIPE_BUF] if polls else view) :]


async def _ready(wait: Callable[[int], Awaitable[None]], fd: int) -> bool:
    """Wait until a file is ready, and give whether it is one that can be polled."""
    try:
        await wait(fd)
    except OSError as exc:
        if exc.errno != errno.EPERM:
            raise
        await trio.lowlevel.checkpoint()
        return False
    return True
