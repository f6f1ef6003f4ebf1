"""Locks between programs on what comes and goes in the data directory.

All are flock(2) locks, which the kernel drops when their holder dies. They guard against tasks
of one program too, since each holder opens the file for itself.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import trio

_RETRY = 0.02  # flock(2) cannot be awaited; seconds between attempts while another holds it


@asynccontextmanager
async def exclusive(path: Path) -> AsyncIterator[None]:
    """Hold a lock whose file exists only while somebody holds it or waits. Cancellable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    await trio.lowlevel.checkpoint()
    while True:
        with try_exclusive(path) as held:
            if held:
                yield
                return
        await trio.sleep(_RETRY)


@contextmanager
def try_exclusive(path: Path) -> Iterator[bool]:
    """Hold such a lock if nobody else does; gives whether it is held. Its directory exists."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # Whoever held it may have removed the file since it was opened.
        held = _lock(fd, fcntl.LOCK_EX) and _is_still(fd, path)
        try:
            yield held
        finally:
            if held:
                path.unlink()
    finally:
        os.close(fd)


def in_use(path: Path) -> AbstractContextManager[bool]:
    """Mark an existing file or directory as used: :func:`unused` is false meanwhile.

    Gives whether it is there.
    """
    return _held(path, fcntl.LOCK_SH)


def unused(path: Path) -> AbstractContextManager[bool]:
    """Give whether nobody marks a file or directory as used, and keep it so."""
    return _held(path, fcntl.LOCK_EX)


@contextmanager
def _held(path: Path, kind: int) -> Iterator[bool]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _lock(fd, kind) and _is_still(fd, path)
    finally:
        os.close(fd)


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
