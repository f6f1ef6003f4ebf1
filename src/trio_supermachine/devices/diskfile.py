"""The file of a disk: complete reads and writes, and ranges given back. All calls block."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from typing import Final

_IOV_MAX: Final = os.sysconf("SC_IOV_MAX")
_ZEROES: Final = bytes(1 << 20)

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def read_all(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Fill ``views`` with the bytes from ``offset`` on.

    :raises OSError: the file cannot be read, or it ends before.
    """
    _move_all(os.preadv, fd, views, offset)


def write_all(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Write ``views`` from ``offset`` on. :raises OSError: the file cannot be written."""
    _move_all(os.pwritev, fd, views, offset)


def discard(fd: int, offset: int, size: int) -> None:
    """Give a range (in bytes) back, if the file system can; its contents may be lost.

    :raises OSError: the file system can, and failed.
    """
    _try_fallocate(fd, _PUNCH_HOLE, offset, size)


def write_zeroes(fd: int, offset: int, size: int, *, unmap: bool) -> None:
    """Make a range (in bytes) zero.

    :param unmap: it may be given back for that.
    :raises OSError: the file cannot be written.
    """
    if _try_fallocate(fd, _PUNCH_HOLE if unmap else _ZERO_RANGE, offset, size):
        return
    end = offset + size
    while offset < end:
        offset += os.pwrite(fd, _ZEROES[: end - offset], offset)


def _move_all(
    move: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    views: Sequence[memoryview],
    offset: int,
) -> None:
    rest = list(views)
    while rest:
        moved = move(fd, rest[:_IOV_MAX], offset)
        if not moved:
            raise OSError(errno.EIO, "the disk's file has become shorter")
        offset += moved
        for index, view in enumerate(rest):
            if moved < len(view):
                rest[: index + 1] = [view[moved:]]
                break
            moved -= len(view)
        else:
            return


def _try_fallocate(fd: int, mode: int, offset: int, size: int) -> bool:
    """Call ``fallocate``; tell whether the file system can do this at all.

    :raises OSError: it can, and failed.
    """
    while _libc.fallocate(fd, mode | _KEEP_SIZE, offset, size):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
