"""A guest's memory: one mapping of this process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, final

from ...devices.memory import GuestMemory
from ...snapshots.memory import PagePatch
from ..copying import ProcessMemory
from ._kvm import ffi
from .api import KvmVm
from .x86.layout import ram_ranges

_NORESERVE: Final = 0x4000  # MAP_NORESERVE: what a guest never touches costs nothing


@final
class MachineMemory:
    """All memory of a guest as one mapping: anonymous, or private and of a file.

    All machines that were restored from a file share its pages, each until it writes to one.

    :param memory_mib: the size in MiB.
    :param file: its first contents, of that size; zeros without one.
    :ivar guest: the memory, for devices.
    :ivar pages: the memory, for captures.
    :ivar size: in bytes.
    :raises OSError: the file cannot be mapped.
    """

    def __init__(self, memory_mib: int, file: Path | None = None) -> None:
        size = memory_mib << 20
        if file is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            self._mapping = mmap.mmap(-1, size, flags=flags)
        else:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                prot = mmap.PROT_READ | mmap.PROT_WRITE
                flags = mmap.MAP_PRIVATE | _NORESERVE
                self._mapping = mmap.mmap(fd, size, flags=flags, prot=prot)
            finally:
                os.close(fd)
        # A child of this program has no use for it, and would make writes cost twice as much.
        self._mapping.madvise(mmap.MADV_DONTFORK)
        self._mapping.madvise(mmap.MADV_DONTDUMP)
        self._bytes = memoryview(self._mapping)
        parts = []
        at = 0
        for start, length in ram_ranges(memory_mib):
            parts.append((start, self._bytes[at : at + length]))
            at += length
        self.guest: GuestMemory = GuestMemory(parts)
        with ffi.from_buffer("char[]", self._mapping) as address:
            self.pages: ProcessMemory = ProcessMemory(
                os.getpid(), int(ffi.cast("uintptr_t", address)), size, restored=file is not None
            )
        self.size = size

    def give_to(self, vm: KvmVm) -> None:
        """Make it the memory of ``vm``, which holds it until ``vm`` is closed."""
        for slot, (start, view) in enumerate(self.guest.ranges):
            vm.set_memory(slot, start, view)

    def patch(self, patches: Iterable[PagePatch]) -> None:
        """Write the pages of ``patches`` into memory, the oldest first, before the guest runs.

        :raises ValueError: a file ends early, or has pages beyond the memory.
        """
        for patch in patches:
            fd = os.open(patch.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                at = patch.offset
                for first, count in patch.runs:
                    start, length = first * mmap.PAGESIZE, count * mmap.PAGESIZE
                    if start + length > self.size:
                        raise ValueError(f"{patch.file} has pages beyond the memory")
                    at = _read_into(fd, self._bytes[start : start + length], at)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Unmap the memory, which nothing uses any more. Idempotent."""
        self.guest.close()
        self._bytes.release()
        self._mapping.close()


def _read_into(fd: int, target: memoryview, offset: int) -> int:
    with target:
        done = 0
        while done < len(target):
            with target[done:] as rest:
                count = os.preadv(fd, [rest], offset + done)
            if not count:
                raise ValueError("a file of memory pages ends early")
            done += count
        return offset + done
