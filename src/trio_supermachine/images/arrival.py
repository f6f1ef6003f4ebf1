"""Blobs on their way into the content store: written by one task, read meanwhile by others.

:class:`BlobWriter` appends to a partial file and tells :class:`Arrival` how far the file has come.
Readers wait on the arrival. They have the file open themselves, so they read it to its end also
after it got its final name. What they read before the blob's digest was checked may be wrong: who
uses the result waits until the writer has checked it.
"""

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
    """The part of a blob that is there: an :class:`~trio_supermachine.oci.decompress.Arrival`."""

    def __init__(self) -> None:
        self._fd = -1
        self._there = 0
        self._news = trio.lowlevel.ParkingLot()
        #: Whether what has come is removed if the rest does not come.
        self.discarded = False

    async def open(self) -> int:
        """Wait until there is a file, and give a descriptor of it, which the caller closes."""
        await trio.lowlevel.checkpoint()
        while self._fd < 0:
            await self._news.park()
        return os.dup(self._fd)

    async def reach(self, count: int) -> int:
        """Wait until ``count`` bytes are there, and give how many are."""
        await trio.lowlevel.checkpoint()
        while self._there < count:
            await self._news.park()
        return self._there

    @property
    def there(self) -> int:
        """The number of bytes that are there."""
        return self._there

    def begin(self, fd: int, there: int) -> None:
        """Take over a descriptor of the file, which has ``there`` bytes already."""
        self._fd = fd
        self.advance(there)

    def advance(self, there: int) -> None:
        """Note that ``there`` bytes are there now, and wake who waits for them."""
        self._there = there
        self._news.unpark_all()

    def close(self) -> None:
        """Close the file. Nobody opens it any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class BlobWriter:
    """Writes a blob to its partial file, after the part that an earlier program left there.

    :param fd: the file, open for reading and writing. Its owner closes it.
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
        #: Bytes that have come, those that are not written yet included.
        self.done: int = 0

    async def resume(self) -> None:
        """Hash the bytes that are in the file already, and go on after them."""
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
        """Add to the blob.

        :raises MalformedError: it is larger than it should be.
        """
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
        """Write what has been added, and tell the readers."""
        await trio.to_thread.run_sync(self.write_pending)
        self._arrival.advance(self.done)

    def write_pending(self) -> None:
        """Write what has been added, in the calling thread."""
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
        """Check that the blob is whole, and the right one.

        :raises MalformedError: its size or digest differs.
        """
        if self.done != self._size:
            raise MalformedError(f"the blob {self._digest} has {self.done} bytes, not {self._size}")
        found = "sha256:" + self._hash.hexdigest()
        if found != self._digest:
            raise MalformedError(f"what came as the blob {self._digest} has the digest {found}")


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk, or an exhausted quota, into :exc:`DiskFull` for ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(str(path)) from error
        raise
