"""Calls of the kernel's KVM interface by name, and the base of its descriptors."""

from __future__ import annotations

import errno
import os
from types import TracebackType
from typing import Final, Self

import attrs

from ._kvm import ffi, lib

_MAX_CPUID_ENTRIES: Final = 256


@attrs.frozen
class CpuidEntry:
    """One leaf or subleaf, as in ``struct kvm_cpuid_entry2``."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def _check(name: str, result: int) -> int:
    if result < 0:
        raise OSError(-result, f"{name}: {os.strerror(-result)}")
    return result


def call(fd: int, name: str, argument: object = ffi.NULL) -> int:
    """Make an ioctl with a pointer. :raises OSError: with the ioctl's name."""
    request: int = getattr(lib, name)
    while (result := lib.kvm_pointer(fd, request, argument)) == -errno.EINTR:
        pass  # some wait for locks, interruptibly
    return _check(name, result)


def call_value(fd: int, name: str, argument: int = 0) -> int:
    """Make an ioctl with a number. :raises OSError: with the ioctl's name."""
    request: int = getattr(lib, name)
    while (result := lib.kvm_value(fd, request, argument)) == -errno.EINTR:
        pass
    return _check(name, result)


class Descriptor:
    """File descriptor that is closed once, and never used afterwards."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read(fd: int, name: str, size: int) -> bytes:
    """Give the structure that an ioctl fills, as bytes."""
    state = ffi.new("char[]", size)
    call(fd, name, state)
    return bytes(ffi.buffer(state))


def write(fd: int, name: str, state: bytes, size: int) -> None:
    """Give a structure to an ioctl. :raises ValueError: the kernel reads another size."""
    if len(state) != size:  # the kernel would read beyond its end
        raise ValueError(f"{name}: {len(state)} bytes, where this host has {size}")
    call(fd, name, ffi.from_buffer("char[]", state))


def read_cpuid(fd: int, name: str) -> list[CpuidEntry]:
    """Give the leaves that an ioctl fills."""
    count = _MAX_CPUID_ENTRIES
    table = ffi.new("struct kvm_cpuid2 *", {"nent": count, "entries": count})
    call(fd, name, table)
    return [
        CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
        for e in (table.entries[i] for i in range(table.nent))
    ]
