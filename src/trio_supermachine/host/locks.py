"""Locks between programs on files and directories of the host.

All are locks of flock(2). The kernel drops a lock when its holder dies. Each holder opens the file
for itself, so a lock holds between tasks of one program, too. flock(2) cannot be awaited: whoever
waits tries again every 20 ms, can be cancelled meanwhile, and is in no queue.

Three kinds differ in what happens to the file:

- The file of :func:`locked` stays. Such a lock has a fixed name, and guards a directory.
- The file of :func:`exclusive` and :func:`try_exclusive` goes with its holder. Such a lock is named
  after the one thing that it guards, and there may be any number of these. The holder removes the
  file *before* it drops the lock. Another program may have opened that file earlier; the lock that
  it gets now is on a file without a name, and guards nothing. So whoever gets a lock checks that
  the path still leads to the file that it opened, and otherwise has not got it.
- :func:`in_use` and :func:`unused` mark a file or directory that exists for its own sake: a shared
  lock says that somebody uses it, an exclusive one that it is being removed. The same check finds
  out whether it was removed in between.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from pathlib import Path

import trio

_RETRY = 0.02  # seconds between attempts while another holds the lock


def locked(path: Path) -> AbstractAsyncContextManager[None]:
    """Hold an exclusive lock on the file ``path``, which stays. Waiting is cancellable."""
    return _waited(path, stays=True)


def exclusive(path: Path) -> AbstractAsyncContextManager[None]:
    """Hold a lock whose file is there only while somebody holds it or waits. Cancellable."""
    return _waited(path, stays=False)


def try_exclusive(path: Path) -> AbstractContextManager[bool]:
    """Hold the lock of :func:`exclusive` if nobody else does; give whether it is held.

    The directory of ``path`` exists.
    """
    return _tried(path, stays=False)


def in_use(path: Path) -> AbstractContextManager[bool]:
    """Mark a file or directory as used, if it is there; give whether it is.

    During the block :func:`unused` gives false.
    """
    return _marked(path, fcntl.LOCK_SH)


def unused(path: Path) -> AbstractContextManager[bool]:
    """Give whether a file or directory is there and nobody marks it as used, and keep it so."""
    return _marked(path, fcntl.LOCK_EX)


@asynccontextmanager
async def _waited(path: Path, *, stays: bool) -> AsyncIterator[None]:
    await trio.lowlevel.checkpoint()
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _tried(path, stays=stays) as held:
            if held:
                yield
                return
        await trio.sleep(_RETRY)


@contextmanager
def _tried(path: Path, *, stays: bool) -> Iterator[bool]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        held = _lock(fd, fcntl.LOCK_EX) and _is_still(fd, path)
        try:
            yield held
        finally:
            if held and not stays:
                path.unlink()
    finally:
        os.close(fd)


@contextmanager
def _marked(path: Path, kind: int) -> Iterator[bool]:
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
