"""Reading the files of a snapshot, any of which may be hostile or damaged."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SnapshotInvalid
from ..oci import MalformedError
from .metadata import REMEDY, FileRef

#: A function that is called between pieces of work, and raises to end it. In a worker thread it
#: is :func:`trio.from_thread.check_cancelled`.
Check = Callable[[], None]

METADATA = "metadata.json"
STATE = "restore.snap"
FULL_MEMORY = "memory.bin"
DIFF_MEMORY = "memory.diff"

_PIECE = 1 << 20  # bytes hashed between checks


@contextmanager
def opened(path: Path, *, follow: bool = False) -> Iterator[int]:
    """Open a regular file for reading, for the length of a block.

    Nothing else is ever opened: opening a FIFO could block, and opening a device could act.

    :param follow: the file may be a symbolic link to another.
    :raises SnapshotInvalid: it is missing, no regular file, or cannot be read.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        found = os.stat(path, follow_symlinks=follow)
        if not stat.S_ISREG(found.st_mode):
            raise SnapshotInvalid(str(path), f"it is {_kind(found)}, not a file; {REMEDY}")
        fd = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    except OSError as error:
        raise SnapshotInvalid(str(path), _why(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # replaced meanwhile
            raise SnapshotInvalid(str(path), f"it is not a file any more; {REMEDY}")
        yield fd
    finally:
        os.close(fd)


@contextmanager
def reading(path: Path, *, follow: bool = False) -> Iterator[int]:
    """Open a file as :func:`opened`, for a block that only reads it.

    An error of the block is the file's fault.

    :raises SnapshotInvalid: also if the file became shorter, or a disk failed.
    """
    with opened(path, follow=follow) as fd:
        try:
            yield fd
        except OSError as error:
            raise SnapshotInvalid(str(path), _why(error)) from error
        except (EOFError, MalformedError) as error:
            raise SnapshotInvalid(str(path), f"{error}; {REMEDY}") from error


def require_size(path: Path, fd: int, size: int) -> None:
    """Refuse a file that was truncated or has grown.

    :raises SnapshotInvalid: it has another size.
    """
    found = os.fstat(fd).st_size
    if found != size:
        how = "truncated" if found < size else "longer than it was"
        raise SnapshotInvalid(str(path), f"it is {how} ({found} bytes, not {size}); {REMEDY}")


def read_exactly(fd: int, size: int, offset: int) -> bytes:
    """Read a piece of a file.

    :raises EOFError: the file is shorter.
    """
    data = os.pread(fd, size, offset)
    while len(data) < size:  # a signal or a file system may cut a read short
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise EOFError("the file became shorter while it was read")
        data += more
    return data


def hash_file(fd: int, check: Check) -> FileRef:
    """Compute the digest and the size of an open file."""
    digest = hashlib.sha256()
    size = 0
    while True:
        check()
        data = os.pread(fd, _PIECE, size)
        if not data:
            return FileRef(sha256=digest.hexdigest(), size=size)
        digest.update(data)
        size += len(data)


def _kind(found: os.stat_result) -> str:
    for test, name in (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(found.st_mode):
            return name
    return "a device"


def _why(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return f"it is missing; {REMEDY}"
        case errno.EACCES | errno.EPERM:
            return "it cannot be read; give this user permission to read it"
        case _:
            return f"it cannot be read ({error.strerror}); {REMEDY}"
