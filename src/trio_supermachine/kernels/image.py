"""Kernel files: their kind and release, the ELF image inside a bzImage, and their extent in memory.

A kernel that starts by PVH, from the ELF image, does not decompress itself. That saves an emulated
guest one second of four at boot. Formats are those of Documentation/arch/x86/boot.rst, and of
Xen's PVH boot protocol, whose entry point an ELF note has.
"""

from __future__ import annotations

import bz2
import lzma
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import attrs

from ..errors import AssetNotFound

#: The most bytes of an unpacked kernel.
MAX_IMAGE: Final = 512 << 20

_SETUP: Final = 0x1F1  # where the setup header begins
_ELF: Final = b"\x7fELF"
_EM_X86_64: Final = 62
_PT_LOAD: Final = 1
_PT_NOTE: Final = 4
_XEN_PHYS32_ENTRY: Final = 18
_RELEASE: Final = re.compile(rb"Linux version ([!-~]{1,64}) ")
#: Bytes that :func:`kernel_extent` reads of a file. The headers of any kernel are within these.
_HEAD: Final = 64 << 10
#: The address where a bzImage is loaded. It unpacks itself elsewhere.
_BZIMAGE_START: Final = 1 << 20
_REMEDY: Final = "give the path of an x86-64 Linux kernel, bzImage or ELF"

_Decompress = Callable[[bytes], bytes]


@attrs.frozen(kw_only=True)
class KernelImage:
    """A kernel in its best form to boot.

    :ivar form: ``"elf"`` for an image that starts by PVH, else ``"bzimage"``.
    """

    release: str
    form: Literal["elf", "bzimage"]
    data: bytes


def least_memory_mib(kernel_end: int, initramfs_size: int) -> int:
    """Give the memory in MiB, a multiple of 8, to which users are told to go at least.

    It holds the kernel, the initramfs, and beside that the files that are unpacked from it.
    """
    return -(-(kernel_end + 2 * initramfs_size + 1) // (8 << 20)) * 8


def read_kernel(data: bytes, origin: str) -> KernelImage:
    """Find the kernel in ``data``, the bytes of a file.

    :param origin: the file's name, for messages.
    :raises AssetNotFound: it is no kernel that can be booted.
    """
    if data[:4] == _ELF:
        if not has_pvh_entry(data):
            raise _unusable(origin, "it is an ELF file, but not an x86-64 kernel with a PVH entry")
        return KernelImage(release=_elf_release(data, origin), form="elf", data=data)
    if data[0x202:0x206] != b"HdrS":
        raise _unusable(origin, "it is neither a bzImage nor an ELF kernel")
    release = _bzimage_release(data, origin)
    payload = _payload(data)
    if payload is not None and has_pvh_entry(payload):
        return KernelImage(release=release, form="elf", data=payload)
    return KernelImage(release=release, form="bzimage", data=data)


def has_pvh_entry(elf: bytes) -> bool:
    """Give whether an ELF image is an x86-64 kernel that can be started by PVH."""
    try:
        (machine,) = struct.unpack_from("<H", elf, 18)
        (offset,) = struct.unpack_from("<Q", elf, 32)
        size, count = struct.unpack_from("<HH", elf, 54)
        if elf[:5] != _ELF + b"\x02" or machine != _EM_X86_64:
            return False
        for index in range(count):
            kind, _, start, _, _, length = struct.unpack_from("<IIQQQQ", elf, offset + index * size)
            if kind == _PT_NOTE and _has_note(elf[start : start + length]):
                return True
    except (struct.error, OverflowError):  # an offset beyond the file, or beyond any
        pass
    return False


@attrs.frozen(kw_only=True)
class KernelExtent:
    """The memory that a kernel takes when it starts.

    :ivar end: the first guest-physical address behind the kernel, once it has unpacked itself.
    :ivar initramfs_max: the highest address that its initramfs may have; ``None`` if the kernel
        does not say.
    """

    end: int
    initramfs_max: int | None = None


def kernel_extent(path: Path) -> KernelExtent | None:
    """Read the memory that a kernel takes from the file's headers; ``None`` if it is no kernel.

    :raises OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD)
    try:
        if head[:4] == _ELF:
            return _elf_extent(head)
        if head[0x202:0x206] == b"HdrS":
            return _bzimage_extent(head, size)
    except (struct.error, OverflowError):
        pass
    return None


def _elf_extent(head: bytes) -> KernelExtent:
    (offset,) = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    end = 0
    for index in range(count):
        at = offset + index * size
        kind, _, _, _, address, _, in_memory = struct.unpack_from("<IIQQQQQ", head, at)
        if kind == _PT_LOAD:
            end = max(end, address + in_memory)
    return KernelExtent(end=end)


def _bzimage_extent(head: bytes, size: int) -> KernelExtent:
    (initramfs_max,) = struct.unpack_from("<I", head, 0x22C)
    # pref_address, where it unpacks itself to, and init_size, the room that it needs there.
    preferred, room = struct.unpack_from("<QI", head, 0x258)
    return KernelExtent(
        end=max(_BZIMAGE_START + size, preferred + room), initramfs_max=initramfs_max
    )


def _has_note(notes: bytes) -> bool:
    position = 0
    while position + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, position)
        name = notes[position + 12 : position + 12 + name_size]
        if kind == _XEN_PHYS32_ENTRY and name == b"Xen\0":
            return True
        position += 12 + (name_size + 3 & ~3) + (size + 3 & ~3)
    return False


def _elf_release(elf: bytes, origin: str) -> str:
    match = _RELEASE.search(elf)
    if match is None:
        raise _unusable(origin, "no Linux version is in it")
    return match[1].decode()


def _bzimage_release(data: bytes, origin: str) -> str:
    (offset,) = struct.unpack_from("<H", data, 0x20E)
    words = data[0x200 + offset : 0x200 + offset + 256].split(b"\0")[0].split()
    if not offset or not words:
        raise _unusable(origin, "its header does not say which release it is")
    return words[0].decode("ascii", "replace")


def _payload(data: bytes) -> bytes | None:
    """Unpack the payload of a bzImage; ``None`` if no library here can."""
    if len(data) < 0x250:
        return None
    sectors = data[_SETUP] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = data[start : start + length]
    for magic, decompress in _DECOMPRESSORS:
        if payload.startswith(magic):
            try:
                return decompress(payload)
            except (zlib.error, lzma.LZMAError, ValueError, OSError, EOFError):
                return None
    return None


def _gzip(data: bytes) -> bytes:
    return zlib.decompressobj(31).decompress(data, MAX_IMAGE)


def _xz(data: bytes) -> bytes:
    return lzma.LZMADecompressor().decompress(data, MAX_IMAGE)


def _bzip2(data: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, MAX_IMAGE)


def _zstd(data: bytes) -> bytes:
    import zstandard  # kernels are read when one is prepared, which a start seldom does

    # The frame need not have its size. The kernel's build appends it, in four bytes.
    (size,) = struct.unpack("<I", data[-4:])
    if size > MAX_IMAGE:
        raise ValueError("too large")
    try:
        return zstandard.ZstdDecompressor(max_window_size=1 << 30).decompress(
            data[:-4], max_output_size=size
        )
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


_DECOMPRESSORS: Final[tuple[tuple[bytes, _Decompress], ...]] = (
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\0", _xz),
    (b"\x5d\0\0", _xz),  # the older .lzma
    (b"BZh", _bzip2),
    (b"\x28\xb5\x2f\xfd", _zstd),
)


def _unusable(origin: str, reason: str) -> AssetNotFound:
    return AssetNotFound("kernel", f"{origin}: {reason}", remedy=_REMEDY)
