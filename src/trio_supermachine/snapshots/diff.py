"""The file ``memory.diff``: the pages of a guest's memory that differ from the base.

The file is a header of one page, the changed pages in ascending order, and a table of runs: for
each its first page and its count, as little-endian 64-bit numbers. Nothing follows.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import attrs

from ..oci import MalformedError
from .files import Check, opened, read_exactly
from .memory import MemoryImage, PagePatch, data_runs
from .pages import PAGE, Run, intersection, total, union

MAGIC = b"TSMdiff\0"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ")  # magic, version, page size, memory size, pages, runs
_RUN = struct.Struct("<QQ")
#: The most runs: more than a guest of 8 GiB can have, with every other page changed.
MAX_RUNS = 1 << 20
_CHUNK = 64  # pages compared at once
_BUFFER = 1 << 20  # bytes


@attrs.frozen
class DiffHeader:
    """The first page of the file.

    :ivar memory_size: the memory's size in bytes.
    :ivar pages: the number of pages in the file.
    :ivar runs: the number of runs in the table.
    """

    memory_size: int
    pages: int
    runs: int

    @property
    def table(self) -> int:
        """The offset of the table of runs, in bytes."""
        return PAGE + self.pages * PAGE

    @property
    def size(self) -> int:
        """The length of the file in bytes."""
        return self.table + self.runs * _RUN.size

    def to_bytes(self) -> bytes:
        """Encode the first page."""
        fields = _HEADER.pack(MAGIC, VERSION, PAGE, self.memory_size, self.pages, self.runs)
        return fields.ljust(PAGE, b"\0")

    @classmethod
    def parse(cls, data: bytes) -> DiffHeader:
        """Read a first page, which is not trusted.

        :raises MalformedError: it is of another kind of file, or out of bounds.
        """
        if len(data) != PAGE or any(data[_HEADER.size :]):
            raise MalformedError("it does not begin with a header")
        magic, version, page, memory_size, pages, runs = _HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION or page != PAGE:
            raise MalformedError("it does not begin with a header of this format")
        if memory_size % PAGE or not runs <= pages <= memory_size // PAGE or runs > MAX_RUNS:
            raise MalformedError("its header makes no sense")
        return cls(memory_size, pages, runs)


def encode_runs(runs: Iterable[Run]) -> bytes:
    """Encode the table of runs."""
    return b"".join(_RUN.pack(*run) for run in runs)


def parse_runs(data: bytes, header: DiffHeader) -> tuple[Run, ...]:
    """Read the table of runs, which is not trusted.

    :raises MalformedError: it is not sorted, leaves the memory, or differs from the header.
    """
    if len(data) != header.runs * _RUN.size:
        raise MalformedError("its table of runs is cut short")
    runs = tuple(_RUN.iter_unpack(data))
    end = 0
    for start, count in runs:
        if start < end or not count:
            raise MalformedError("its table of runs is not in order")
        end = start + count
    if end * PAGE > header.memory_size or total(runs) != header.pages:
        raise MalformedError("its table of runs does not fit the memory")
    return runs


def read_patch(path: Path, fd: int, memory_size: int) -> PagePatch:
    """Read which pages the open file ``path`` replaces in a memory of this size.

    :raises MalformedError: it is no such file, or damaged.
    """
    try:
        header = DiffHeader.parse(read_exactly(fd, PAGE, 0))
        if header.memory_size != memory_size:
            raise MalformedError("it is for a guest with another size of memory")
        if header.size != os.fstat(fd).st_size:
            raise MalformedError("it is not as long as its header says")
        table = read_exactly(fd, header.runs * _RUN.size, header.table)
    except EOFError as error:
        raise MalformedError(str(error)) from None
    return PagePatch(path, parse_runs(table, header), PAGE)


def pack_diff(
    captured: Path, runs: Iterable[Run], base: MemoryImage, dest: Path, check: Check
) -> int:
    """Write the new file ``dest`` with those pages of ``runs`` that differ from ``base``.

    :param captured: a full memory file; pages outside ``runs`` are not looked at.
    :param runs: the pages that may have changed, in any order.
    :returns: the number of pages written.
    :raises ValueError: a run is not inside the memory, or the pages make too many runs.
    :raises EOFError: a file became shorter.
    :raises OSError: ``dest`` could not be written.
    """
    candidates = union(runs)
    if candidates and (candidates[0][0] < 0 or sum(candidates[-1]) * PAGE > base.size):
        raise ValueError("a run of captured pages is not inside the guest's memory")
    kept: list[Run] = []
    with opened(captured) as fd, base.reader() as old, dest.open("xb", _BUFFER) as out:
        stored = union(data_runs(fd, base.size), old.stored())  # all else is zero in both
        out.write(bytes(PAGE))
        for start, count in intersection(candidates, stored):
            for first in range(start, start + count, _CHUNK):
                check()
                length = min(_CHUNK, start + count - first)
                new = read_exactly(fd, length * PAGE, first * PAGE)
                was = old.read(first, length)
                if new == was:
                    continue
                for index in range(length):
                    place = slice(index * PAGE, (index + 1) * PAGE)
                    if new[place] != was[place]:
                        out.write(new[place])
                        _append(kept, first + index)
            if len(kept) > MAX_RUNS:
                raise ValueError("the changed pages are too scattered; make a full snapshot")
        out.write(encode_runs(kept))
        header = DiffHeader(base.size, total(kept), len(kept))
        out.seek(0)
        out.write(header.to_bytes())
    return header.pages


def _append(runs: list[Run], page: int) -> None:
    if runs and sum(runs[-1]) == page:
        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
    else:
        runs.append((page, 1))
