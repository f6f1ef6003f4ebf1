"""Guest memory as pages of the process that maps it, which is QEMU or this one; and its copying.

Theory of operation.

*Which pages have changed* is known without a log of writes. After a restore, guest memory is a
private mapping of the snapshot's file. When the guest first writes to a page, the kernel replaces
it by an anonymous one, and ``/proc/PID/pagemap`` tells which pages are anonymous. After a boot all
of memory is anonymous, and pages that the guest never touched are not there. Pages on the host's
swap count as changed. ``/proc/PID/mem`` reads and writes pages.

*A capture copies twice*, so that the guest stands still for as short as can be
(:class:`Copying`):

1. While the guest runs, :meth:`Copying.prepare` fills the file: a restored machine's with what it
   was restored from, then with the pages that have changed. Pages that are torn, or that change
   later, do no harm:
2. At rest, :meth:`Copying.finish` copies the changed pages again. All processors of the host share
   the work, as the guest's are idle. Writing over blocks that the file system has allocated takes a
   fraction of the time.

A diff (``since``) is small, and skips the first step.

*Holes.* The file is sparse. A chunk of 64 KiB that is zero is not written, unless the file may have
other bytes there: step 1 notes the chunks that it has written (``dirty``), and step 2 writes zeros
over these. A file that began as a copy of another has bytes anywhere, so all is written.

*A hostile guest* can only choose the bytes of its pages; how many there are, the host has decided.

Both files need the right to trace the process. A process has it for itself, and a parent for its
child unless Yama's ``ptrace_scope`` is 2 or 3.
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
    """Memory of the machine that process ``pid`` runs.

    All methods raise :exc:`CaptureFailed` if the process may not be looked into. They block.

    :param address: the virtual address in that process at which it begins.
    :param size: in bytes.
    :param restored: whether it is a private mapping of a file.
    """

    def __init__(self, pid: int, address: int, size: int, *, restored: bool) -> None:
        self._pid = pid
        self._address = address
        self._size = size
        self.pages: int = size // PAGE
        self._wanted = _CHANGED if restored else _THERE

    def runs(self) -> tuple[Run, ...]:
        """Find the pages that the guest has changed since the restore, or touched since a boot."""
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

        :param dirty: the numbers of the chunks of ``file`` that may be other than zero; those that
            are written are added. ``None`` stands for all chunks.
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
        """Write the pages of ``patches`` into memory. Before the guest runs."""
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
        """Make the copying for :meth:`.Machine.capture` of a machine that began as ``restore``."""
        if since is not None and restore is not None and since == restore.identity:
            return cls(guest, file)
        return cls(guest, file, whole=True, restore=restore)

    def prepare(self) -> None:
        """Copy what can be copied while the guest runs. For a worker thread."""
        if self.whole and self._restore is not None:
            self._dirty = None
            _copy_restored(self._restore, self._file)
        if self.whole:
            # These pages are copied again at rest. To write over blocks that are there is quick.
            self._guest.copy_to(self._file, self._guest.runs(), dirty=self._dirty)

    async def finish(self) -> None:
        """Copy what has changed, so that the file is what memory is now. The guest stands still."""
        runs = await trio.to_thread.run_sync(self._guest.runs)
        async with open_flat_nursery() as nursery:
            for part in _parts(runs, len(os.sched_getaffinity(0))):
                nursery.start_soon(trio.to_thread.run_sync, self._copy, part)
        self.runs = ((0, self._guest.pages),) if self.whole else runs

    def _copy(self, runs: tuple[Run, ...]) -> None:
        self._guest.copy_to(self._file, runs, dirty=self._dirty)


def _parts(runs: tuple[Run, ...], count: int) -> Iterator[tuple[Run, ...]]:
    """Divide ``runs`` into at most ``count`` parts of equally many pages."""
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
    """Divide ``runs`` at the bounds of chunks; give offset and size of each part, in bytes."""
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
    """Make a file and open it for a block, for writing only, as QEMU wants it.

    :raises FileExistsError: there is such a file.
    """
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
