"""A blob on its way into the content store: written by one task, read meanwhile by others."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import trio

from ..errors import DiskFull
from ..oci import MalformedError

_BUFFER: Final = 1 << 19  # bytes that are written, and hashed, at a time
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


@final
class Arrival:
    """How far a blob has come; an :class:`~trio_supermachine.oci.decompress.Arrival`."""

    def __init__(self) -> None:
        self._fd = -1
        self._there = 0
        self._news = trio.lowlevel.ParkingLot()
        #: What has come is not to be kept if the rest does not.
        self.discarded = False

    async def open(self) -> int:
        """Wait until there is a file; a descriptor of it, which the caller closes."""
        await trio.lowlevel.checkpoint()
        while self._fd < 0:
            await self._news.park()
        return os.dup(self._fd)

    async def reach(self, count: int) -> int:
        """Wait until ``count`` bytes are there; how many are."""
        await trio.lowlevel.checkpoint()
        while self._there < count:
            await self._news.park()
        return self._there

    @property
    def there(self) -> int:
        """How many bytes there are."""
        return self._there

    def begin(self, fd: int, there: int) -> None:
        """Take a descriptor of the file, in which so many bytes are already."""
        self._fd = fd
        self.advance(there)

    def advance(self, there: int) -> None:
        """Note that so many bytes are there now."""
        self._there = there
        self._news.unpark_all()

    def close(self) -> None:
        """Close the file; nobody opens it any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class BlobWriter:
    """Writes a blob to its partial file, after what an earlier program left of it there.

    :param fd: the file, open for reading and writing; closed by its owner.
    """

    def __init__(self, fd: int, path: Path, digest: str, size: int, arrival: Arrival) -> None:
        self._fd = fd
        self._path = path
        self._digest = digest
        self._size = size
        self._arrival = arrival
        self._hash = hashlib.sha256()
        self._pending: list[bytes] = []
        self._pending_size = 0
        #: How many bytes there are, those that are not written yet too.
        self.done = 0

    async def resume(self) -> None:
        """Hash what is in the file already, and go on after it."""
        await trio.to_thread.run_sync(self._resume)
        self._arrival.advance(self.done)

    def _resume(self) -> None:
        there = os.fstat(self._fd).st_size
        if there > self._size:
            os.ftruncate(self._fd, 0)
        while data := os.pread(self._fd, _BUFFER, self.done):
            trio.from_thread.check_cancelled()
            self._hash.update(data)
            self.done += len(data)

    async def write(self, data: bytes) -> None:
        """Add to the blob. :raises MalformedError: it is larger than it should be."""
        if self.done + len(data) > self._size:
            raise MalformedError(f"the blob {self._digest} is larger than {self._size} bytes")
        self._pending.append(data)
        self._pending_size += len(data)
        self.done += len(data)
        if self._pending_size >= _BUFFER:
            await self.flush()
        else:
            await trio.lowlevel.checkpoint()

    async def flush(self) -> None:
        """Write what has been added."""
        await trio.to_thread.run_sync(self.write_pending)
        self._arrival.advance(self.done)

    def write_pending(self) -> None:
        """Write what has been added, in this thread."""
        data = memoryview(b"".join(self._pending))
        offset = self.done - self._pending_size
        self._pending.clear()
        self._pending_size = 0
        self._hash.update(data)
        while data:
            written = os.pwrite(self._fd, data, offset)
            offset += written
            data = data[written:]

    def check(self) -> None:
        """Check that the blob is whole. :raises MalformedError: it is not what it should be."""
        if self.done != self._size:
            raise MalformedError(f"the blob {self._digest} has {self.done} bytes, not {self._size}")
        found = "sha256:" + self._hash.hexdigest()
        if found != self._digest:
            raise MalformedError(f"what came as the blob {self._digest} has the digest {found}")


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn what a full disk raises into :exc:`DiskFull`, which names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(str(path)) from error
        raise
