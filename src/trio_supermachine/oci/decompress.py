"""Layer blobs as streams: a slice of a file, hashed, decompressed, bounded, and hashed again.

A blob may still be on its way. Its reader is in a worker thread of Trio's, and waits there for each
part that has not come yet. What it reads is checked against the digests only at the end, so nothing
that it makes of a layer may be used before that.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import attrs
import trio

from . import MalformedError
from .tar import Source

CHUNK = 1 << 18
_ZSTD_WINDOW = 1 << 27  # bytes; the largest that the zstd tool takes by default


class Arrival(Protocol):
    """A file that grows, from its beginning on."""

    async def open(self) -> int:
        """Wait until there is a file, and give a descriptor of it, which the caller closes."""

    async def reach(self, count: int) -> int:
        """Wait until ``count`` bytes are there, and give how many are."""


@attrs.frozen
class Blob:
    """A blob's place: a slice of a file.

    :ivar arrival: of a blob that is on its way: tells how far it has come. Such a blob is read in a
        worker thread of Trio's, which waits for the rest.
    """

    path: Path
    offset: int
    size: int
    arrival: Arrival | None = attrs.field(default=None, eq=False)

    def wait(self, count: int) -> int:
        """Wait until the first ``count`` bytes are there, and give how many are. Cancellable."""
        if self.arrival is None:
            return self.size
        return trio.from_thread.run(self.arrival.reach, count)


class BlobStream:
    """A blob's bytes as they are stored, hashed on the way (sha256).

    :param check: is called before each chunk, and raises to stop.
    """

    def __init__(self, file: BinaryIO, blob: Blob, check: Callable[[], None]) -> None:
        self._file = file
        self._blob = blob
        self._done = 0
        self._there = blob.size if blob.arrival is None else 0
        self._check = check
        self._hash = hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        self._check()
        size = min(size, self._blob.size - self._done)
        if size and self._done == self._there:
            self._there = self._blob.wait(self._done + 1)
        # pread: the writer of a growing file has the same open file, with one position for both.
        size = min(size, self._there - self._done)
        data = os.pread(self._file.fileno(), size, self._blob.offset + self._done)
        if not data and size:
            raise MalformedError("a blob is shorter than it was")
        self._done += len(data)
        self._hash.update(data)
        return data

    def digest(self) -> str:
        """Read the rest, and give the digest of the whole blob, ``sha256:...``."""
        while self.read(CHUNK):
            pass
        return "sha256:" + self._hash.hexdigest()


class _Gunzip:
    """A gzip stream (RFC 1952), of several members perhaps. It keeps one chunk in memory."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._inflate = zlib.decompressobj(wbits=31)
        self._pending = b""

    def read(self, size: int, /) -> bytes:
        while True:
            if not self._pending:
                self._pending = self._source.read(CHUNK)
                if not self._pending:
                    if not self._inflate.eof:
                        raise MalformedError("a gzip stream ends early")
                    return b""
            if self._inflate.eof:
                if not self._pending.strip(b"\0"):
                    self._pending = b""  # padding after the last member, which gzip allows, too
                    continue
                self._inflate = zlib.decompressobj(wbits=31)
            try:
                data = self._inflate.decompress(self._pending, size)
            except zlib.error as error:
                raise MalformedError(f"a gzip stream is damaged: {error}") from None
            self._pending = self._inflate.unused_data or self._inflate.unconsumed_tail
            if data:
                return data


class _Unzstd:
    def __init__(self, source: Source) -> None:
        import zstandard  # most layers are gzipped, and most runs read none

        self._error = zstandard.ZstdError
        self._reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(
            cast(BinaryIO, source),  # the reader calls nothing but read
            read_across_frames=True,
        )

    def read(self, size: int, /) -> bytes:
        try:
            return self._reader.read(size)
        except self._error as error:
            raise MalformedError(f"a zstd stream is damaged: {error}") from None


class LayerStream:
    """The uncompressed bytes of a layer, hashed on the way; at most ``limit`` bytes."""

    def __init__(self, source: Source, limit: int) -> None:
        self._source = source
        self._limit = limit
        self._hash = hashlib.sha256()
        self._done = 0

    def read(self, size: int, /) -> bytes:
        data = self._source.read(size)
        self._done += len(data)
        if self._done > self._limit:
            raise MalformedError(f"a layer is larger than the limit of {self._limit} bytes")
        self._hash.update(data)
        return data

    def digest(self) -> str:
        """Read the rest, and give the diff_id of the whole layer."""
        while self.read(CHUNK):
            pass
        return "sha256:" + self._hash.hexdigest()


@contextmanager
def opened(blob: Blob) -> Iterator[BinaryIO]:
    """Open a blob's file. It must be a regular file, and as large as the blob needs."""
    if blob.arrival is not None:
        with os.fdopen(trio.from_thread.run(blob.arrival.open), "rb", buffering=0) as file:
            yield file
        return
    # O_NONBLOCK: opening a FIFO, in the place of a file, would wait for a writer for ever.
    fd = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise MalformedError(f"{blob.path} is not a regular file")
        if blob.offset + blob.size > status.st_size:
            raise MalformedError(f"{blob.path} is shorter than it was")
        yield file


@contextmanager
def open_layer(
    blob: Blob, limit: int, check: Callable[[], None]
) -> Iterator[tuple[BlobStream, LayerStream]]:
    """Open a layer that is stored plain, or compressed by gzip or zstd: its first bytes tell."""
    with ExitStack() as stack:
        file = stack.enter_context(opened(blob))
        blob.wait(min(4, blob.size))
        magic = os.pread(file.fileno(), min(4, blob.size), blob.offset)
        stored = BlobStream(file, blob, check)
        source: Source = stored
        if magic[:2] == b"\x1f\x8b":
            source = _Gunzip(stored)
        elif magic == b"\x28\xb5\x2f\xfd" or (magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5):
            source = _Unzstd(stored)
        yield stored, LayerStream(source, limit)
