"""Guest memory in files: a full and sparse one, and patches of changed pages over it."""

from __future__ import annotations

import errno
import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs

from .files import Check, opened, read_exactly
from .metadata import MemoryRef
from .pages import PAGE, Run

BLOCK = 1 << 16  # bytes
_ZERO = bytes(BLOCK)


@attrs.frozen
class PagePatch:
    """Pages that replace those of the memory below.

    :ivar file: the file that holds the pages, one after another in the order of the runs.
    :ivar runs: the pages' places in memory, each run with its first page and its count; sorted.
    :ivar offset: the place of the first page in the file, in bytes.
    """

    file: Path
    runs: tuple[Run, ...]
    offset: int


@attrs.frozen
class MemoryImage:
    """A guest's memory: a full file, and patches over it.

    :ivar root: the full file.
    :ivar size: the memory's size in bytes.
    :ivar patches: the patches, in the order in which they are put over it.
    """

    root: Path
    size: int
    patches: tuple[PagePatch, ...] = ()

    @contextmanager
    def reader(self) -> Iterator[MemoryReader]:
        """Open the files, to read pages as a restored guest would see them.

        :raises SnapshotInvalid: a file is missing or cannot be read.
        """
        with ExitStack() as stack:
            root = stack.enter_context(opened(self.root))
            patches = [
                _OpenPatch(patch, stack.enter_context(opened(patch.file))) for patch in self.patches
            ]
            yield MemoryReader(root, self.size, patches)


class MemoryReader:
    """The open files of a :class:`MemoryImage`."""

    def __init__(self, root: int, size: int, patches: list[_OpenPatch]) -> None:
        self._root = root
        self._size = size
        self._patches = patches

    def read(self, page: int, count: int) -> bytes:
        """Read ``count`` pages.

        :raises EOFError: a file became shorter.
        """
        data = read_exactly(self._root, count * PAGE, page * PAGE)
        for patch in self._patches:
            data = patch.apply(data, page, count)
        return data

    def stored(self) -> list[Run]:
        """Give the pages that could be other than zero."""
        runs = list(data_runs(self._root, self._size))
        for patch in self._patches:
            runs.extend(patch.runs)
        return runs


class _OpenPatch:
    def __init__(self, patch: PagePatch, fd: int) -> None:
        self.runs = patch.runs
        self._fd = fd
        self._starts = [start for start, _ in patch.runs]
        self._offsets = []
        offset = patch.offset
        for _, count in patch.runs:
            self._offsets.append(offset)
            offset += count * PAGE

    def apply(self, data: bytes, page: int, count: int) -> bytes:
        end = page + count
        index = max(bisect_right(self._starts, page) - 1, 0)
        patched: bytearray | None = None
        while index < len(self.runs) and self._starts[index] < end:
            start, length = self.runs[index]
            first, last = max(start, page), min(start + length, end)
            if first < last:
                place = self._offsets[index] + (first - start) * PAGE
                if patched is None:
                    patched = bytearray(data)
                patched[(first - page) * PAGE : (last - page) * PAGE] = read_exactly(
                    self._fd, (last - first) * PAGE, place
                )
            index += 1
        return data if patched is None else bytes(patched)


def data_runs(fd: int, size: int) -> Iterator[Run]:
    """Give the pages of an open file that are not in a hole."""
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        first, last = start // PAGE, -(-end // PAGE)
        if first < last:
            yield first, last - first
        offset = max(end, offset + 1)


def digest_memory(fd: int, size: int, check: Check) -> MemoryRef:
    """Compute the digest of a full memory file of ``size`` bytes, wherever its holes are.

    It is the SHA-256 over each block of 64 KiB that is not all zero: its offset as eight
    little-endian bytes, then the block.

    :raises EOFError: the file is shorter.
    """
    digest = hashlib.sha256()
    data = 0
    done = 0  # bytes; runs end at pages, blocks may go beyond them
    for page, count in data_runs(fd, size):
        start = max(page * PAGE // BLOCK * BLOCK, done)
        for offset in range(start, (page + count) * PAGE, BLOCK):
            check()
            block = read_exactly(fd, BLOCK, offset)
            done = offset + BLOCK
            if block != _ZERO:
                digest.update(offset.to_bytes(8, "little"))
                digest.update(block)
                data += BLOCK
    return MemoryRef(sha256=digest.hexdigest(), size=size, data=data)
