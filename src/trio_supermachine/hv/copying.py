"""Guest memory as pages of the process that maps it: QEMU's, or this one.

After a restore, guest memory is a private mapping of the snapshot's file: a page that the guest
has changed is anonymous, and ``/proc/PID/pagemap`` tells which are. After a boot all of it is
anonymous, and pages that were never touched are not there. So nothing has to log writes.

Needs the right to trace the process, which it has of itself, and a parent has of its child
(unless Yama's ``ptrace_scope`` is 2 or 3).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import trio

from .._util.nursery import open_flat_nursery
from ..errors import CaptureFailed
from ..snapshots.memory import PagePatch, data_runs
from ..snapshots.pages import PAGE, Run, total
from .base import Restore

_CHUNK: Final = 64 * 1024
_ZERO: Final = bytes(_CHUNK)
_ENTRY: Final = 8  # bytes of pagemap for a page
_ENTRIES: Final = 64 * 1024  # read at once

# Bits of a pagemap entry, in its highest byte.
_PRESENT: Final = 0x80
_SWAPPED: Final = 0x40
_OF_A_FILE: Final = 0x20


def _table(wanted: Callable[[int], bool]) -> bytes:
    return bytes(wanted(flags) for flags in range(256))


_THERE: Final = _table(lambda flags: bool(flags & (_PRESENT | _SWAPPED)))
_CHANGED: Final = _table(
    lambda flags: bool(flags & _SWAPPED) or flags & (_PRESENT | _OF_A_FILE) == _PRESENT
)
_RUN: Final = re.compile(b"\1+")


@final
class ProcessMemory:
    """The memory of the machine that process ``pid`` runs.

    :param address: where it begins in that process.
    :param size: in bytes.
    :param restored: it is a private mapping of a file.
    :raises CaptureFailed: this process may not be looked into.
    """

    def __init__(self, pid: int, address: int, size: int, *, restored: bool) -> None:
        self._pid = pid
        self._address = address
        self._size = size
        self.pages = size // PAGE
        self._wanted = _CHANGED if restored else _THERE

    def runs(self) -> tuple[Run, ...]:
        """The pages that the guest has changed since the restore, or ever touched."""
        found: list[Run] = []
        with _opened(f"/proc/{self._pid}/pagemap", os.O_RDONLY) as fd:
            for first in range(0, self.pages, _ENTRIES):
                count = min(_ENTRIES, self.pages - first)
                at = (self._address // PAGE + first) * _ENTRY
                entries = os.pread(fd, count * _ENTRY, at)
                if len(entries) != count * _ENTRY:
                    raise CaptureFailed("the machine's memory is not where it should be")
                for match in _RUN.finditer(entries[_ENTRY - 1 :: _ENTRY].translate(self._wanted)):
                    found.append((first + match.start(), match.end() - match.start()))
        return tuple(found)

    def copy_to(self, file: int, runs: Iterable[Run], *, dirty: set[int] | None) -> None:
        """Write pages into the descriptor ``file``, each at its place.

        :param dirty: the chunks of ``file`` that may be other than zero, and those that this
            makes so; ``None``: any.
        """
        with _opened(f"/proc/{self._pid}/mem", os.O_RDONLY) as memory:
            for offset, size in _chunks(runs):
                data = os.pread(memory, size, self._address + offset)
                if len(data) != size:
                    raise CaptureFailed("the machine's memory cannot be read")
                if dirty is None:
                    _write(file, data, offset)
                elif data != _ZERO[:size] or offset // _CHUNK in dirty:
                    _write(file, data, offset)
                    dirty.add(offset // _CHUNK)
                trio.from_thread.check_cancelled()

    def patch(self, patches: Iterable[PagePatch]) -> None:
        """Put the pages of ``patches`` in, before the guest runs."""
        with _opened(f"/proc/{self._pid}/mem", os.O_RDWR) as memory:
            for patch in patches:
                with _opened(patch.file, os.O_RDONLY) as file:
                    at = patch.offset
                    for offset, size in _chunks(patch.runs):
                        if offset + size > self._size:
                            raise CaptureFailed(f"{patch.file} has pages beyond the memory")
                        _write(memory, os.pread(file, size, at), self._address + offset)
                        at += size


@final
class Copying:
    """The copy of a machine's memory into a file, in two steps: with the guest running, and then
    at rest.

    :param file: an empty descriptor of the memory's size.
    :param whole: copy all memory, not only what has changed since the restore.
    :param restore: where the machine began.
    """

    def __init__(
        self,
        guest: ProcessMemory,
        file: int,
        *,
        whole: bool = False,
        restore: Restore | None = None,
    ) -> None:
        self._guest = guest
        self._file = file
        self._restore = restore
        self._dirty: set[int] | None = set()
        self.whole = whole
        self.runs: tuple[Run, ...] = ()

    @classmethod
    def of(
        cls, guest: ProcessMemory, file: int, restore: Restore | None, since: str | None
    ) -> Copying:
        """What :meth:`~.base.Machine.capture` copies of a machine that began with ``restore``."""
        if since is not None and restore is not None and since == restore.identity:
            return cls(guest, file)
        return cls(guest, file, whole=True, restore=restore)

    def prepare(self) -> None:
        """Do what can be done while the guest runs, in a worker thread."""
        if self.whole and self._restore is not None:
            self._dirty = None
            _copy_restored(self._restore, self._file)
        if self.whole:
            # All of it is read again at rest. But then the file's pages are there to be written
            # over, and that is most of the time.
            self._guest.copy_to(self._file, self._guest.runs(), dirty=self._dirty)

    async def finish(self) -> None:
        """Make the file what memory is now. The guest's processors are idle: all of them copy."""
        runs = await trio.to_thread.run_sync(self._guest.runs)
        async with open_flat_nursery() as nursery:
            for part in _parts(runs, len(os.sched_getaffinity(0))):
                nursery.start_soon(trio.to_thread.run_sync, self._copy, part)
        self.runs = ((0, self._guest.pages),) if self.whole else runs

    def _copy(self, runs: tuple[Run, ...]) -> None:
        self._guest.copy_to(self._file, runs, dirty=self._dirty)


def _parts(runs: tuple[Run, ...], count: int) -> Iterator[tuple[Run, ...]]:
    """``runs`` in at most ``count`` parts of as many pages each."""
    share = max(_CHUNK // PAGE, -(-total(runs) // count))
    part: list[Run] = []
    room = share
    for first, pages in runs:
        while pages:
            taken = min(pages, room)
            part.append((first, taken))
            first, pages, room = first + taken, pages - taken, room - taken
            if not room:
                yield tuple(part)
                part, room = [], share
    if part:
        yield tuple(part)


def _copy_restored(restore: Restore, file: int) -> None:
    """Write the memory that a machine was restored from into the empty descriptor ``file``."""
    with _opened(restore.memory, os.O_RDONLY) as source:
        for first, count in data_runs(source, os.fstat(source).st_size):
            _copy_range(source, first * PAGE, file, first * PAGE, count * PAGE)
    for patch in restore.patches:
        with _opened(patch.file, os.O_RDONLY) as source:
            at = patch.offset
            for first, count in patch.runs:
                _copy_range(source, at, file, first * PAGE, count * PAGE)
                at += count * PAGE


def _copy_range(source: int, offset: int, file: int, to: int, size: int) -> None:
    step = 16 * _CHUNK
    for at in range(0, size, step):
        _write(file, os.pread(source, min(step, size - at), offset + at), to + at)
        trio.from_thread.check_cancelled()


def _chunks(runs: Iterable[Run]) -> Iterator[tuple[int, int]]:
    """Offset and size, in bytes, of the parts of ``runs`` that lie in one chunk each."""
    for first, count in runs:
        offset, end = first * PAGE, (first + count) * PAGE
        while offset < end:
            size = min(_CHUNK - offset % _CHUNK, end - offset)
            yield offset, size
            offset += size


def _write(file: int, data: bytes, offset: int) -> None:
    done = os.pwrite(file, data, offset)
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A new file, open for writing only: QEMU takes no other descriptor to write to."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _opened(path: str | Path, flags: int) -> Iterator[int]:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC)
    except PermissionError as exc:
        if not str(path).startswith("/proc/"):
            raise
        raise CaptureFailed(
            f"{path} may not be opened: this host forbids a program to look into its own"
            " children; set kernel.yama.ptrace_scope to 0 or 1"
        ) from exc
    try:
        yield fd
    finally:
        os.close(fd)
