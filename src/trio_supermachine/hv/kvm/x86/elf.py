"""A reader of ELF kernels that can be started by PVH: the places of their parts, and their entry.

The file is a user's and may be anything. All reads are bounded, and a file that makes no sense
raises :exc:`AssetNotFound`, as one that is no kernel at all.
"""

from __future__ import annotations

import io
import struct
from typing import Final

import attrs

from ....errors import AssetNotFound

#: An open file to read from. A raw one is read straight into guest memory.
Source = io.RawIOBase | io.BufferedIOBase

MAGIC: Final = b"\x7fELF"

# Of the header: magic, class, encoding, machine; offset, size and number of program headers.
_HEADER: Final = struct.Struct("<4sBB12xH12xQ14xHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_NOTE: Final = struct.Struct("<III")
_CLASS_64: Final = 2
_LITTLE_ENDIAN: Final = 1
_EM_X86_64: Final = 62
_PT_LOAD: Final = 1
_PT_NOTE: Final = 4
_XEN_ELFNOTE_PHYS32_ENTRY: Final = 18

_MAX_PROGRAM_HEADERS: Final = 64
_MAX_NOTES: Final = 64 << 10

_REMEDY: Final = "give the path of an x86-64 Linux kernel, bzImage or ELF, with CONFIG_PVH"


@attrs.frozen
class Segment:
    """Bytes of the file with their place in memory; sizes are in bytes.

    :ivar size_in_memory: its size there; all beyond ``size`` is zero.
    """

    offset: int
    address: int
    size: int
    size_in_memory: int

    @property
    def end(self) -> int:
        """The first guest-physical address behind it."""
        return self.address + self.size_in_memory


@attrs.frozen
class PvhKernel:
    """Segments to load, ascending by address, and the address to start at in 32-bit mode."""

    entry: int
    segments: tuple[Segment, ...]

    @property
    def end(self) -> int:
        """The first guest-physical address behind the kernel."""
        return max(segment.end for segment in self.segments)


def read_pvh_kernel(file: Source, origin: str) -> PvhKernel:
    """Read the headers of an ELF kernel.

    :param origin: the file's name, for messages.
    :raises AssetNotFound: it is no sound ELF kernel with a PVH entry.
    :raises OSError: the file cannot be read.
    """
    header = _read(file, 0, _HEADER.size, origin)
    magic, class_, encoding, machine, table, entry_size, count = _HEADER.unpack(header)
    if (magic, class_, encoding, machine) != (MAGIC, _CLASS_64, _LITTLE_ENDIAN, _EM_X86_64):
        raise unusable(origin, "it is no ELF kernel for x86-64")
    if entry_size != _PROGRAM_HEADER.size or not 0 < count <= _MAX_PROGRAM_HEADERS:
        raise unusable(origin, "its program headers make no sense")
    segments: list[Segment] = []
    entry: int | None = None
    headers = _read(file, table, count * entry_size, origin)
    for kind, _, offset, _, address, size, size_in_memory, _ in _PROGRAM_HEADER.iter_unpack(
        headers
    ):
        if kind == _PT_LOAD and size_in_memory:
            segments.append(Segment(offset, address, size, size_in_memory))
        elif kind == _PT_NOTE and entry is None:
            entry = _find_entry(_read(file, offset, min(size, _MAX_NOTES), origin))
    segments.sort(key=lambda segment: segment.address)
    _check(segments, entry, origin)
    assert entry is not None
    return PvhKernel(entry, tuple(segments))


def unusable(origin: str, reason: str) -> AssetNotFound:
    """Make the error for a kernel that cannot be booted."""
    return AssetNotFound("kernel", f"{origin}: {reason}", remedy=_REMEDY)


def read_into(file: Source, offset: int, view: memoryview, origin: str) -> None:
    """Fill ``view`` from the file. :raises AssetNotFound: the file ends before."""
    if view.nbytes:
        file.seek(offset)
    done = 0
    while done < view.nbytes:
        count = file.readinto(view[done:])
        if not count:
            raise unusable(origin, "it is truncated")
        done += count


def _read(file: Source, offset: int, length: int, origin: str) -> bytes:
    if offset + length >= 1 << 63:
        raise unusable(origin, "it is truncated")
    data = bytearray(length)
    read_into(file, offset, memoryview(data), origin)
    return bytes(data)


def _check(segments: list[Segment], entry: int | None, origin: str) -> None:
    if entry is None:
        raise unusable(origin, "it has no PVH entry")
    end = 0
    for segment in segments:
        sound = segment.size <= segment.size_in_memory and segment.offset + segment.size < 1 << 63
        if not sound or segment.address < end:
            raise unusable(origin, "its segments make no sense")
        end = segment.end
    if not any(segment.address <= entry < segment.end for segment in segments):
        raise unusable(origin, "its PVH entry lies outside of it")


def _find_entry(notes: bytes) -> int | None:
    """Find the address in the note of type PHYS32_ENTRY whose name is ``Xen``."""
    position = 0
    while position + _NOTE.size <= len(notes):
        name_size, size, kind = _NOTE.unpack_from(notes, position)
        name_start = position + _NOTE.size
        start = name_start + (name_size + 3 & ~3)
        if kind == _XEN_ELFNOTE_PHYS32_ENTRY and size in (4, 8):
            value = notes[start : start + size]
            if notes[name_start : name_start + name_size] == b"Xen\0" and len(value) == size:
                return int.from_bytes(value, "little")
        position = start + (size + 3 & ~3)
    return None
