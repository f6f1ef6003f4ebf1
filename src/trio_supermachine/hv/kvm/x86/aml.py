"""ACPI machine language: the few terms that a table of plain names and resources needs.

Each function encodes one term (ACPI 6.5, chapter 20) or one resource descriptor (§6.4), which its
docstring names. Arguments come from this program, never from a guest; one that cannot be encoded
raises :exc:`ValueError`.
"""

from __future__ import annotations

import re
import struct
from typing import Final

_SEGMENT: Final = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_EISA_ID: Final = re.compile(r"[A-Z]{3}[0-9A-F]{4}")

_MAX_PACKAGE_LENGTH: Final = (1 << 28) - 1

# Flags of address space descriptors (§6.4.3.5).
_FIXED: Final = 0x0C  # both its ends
_READ_WRITE: Final = 0x01  # memory; not cacheable
_TYPE_MEMORY: Final = 0
_TYPE_BUS: Final = 2


def integer(value: int) -> bytes:
    """Encode an integer of 0 to 2**64 - 1, in its shortest encoding."""
    if value in (0, 1):
        return bytes((value,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value} is no integer of 64 bits")


def string(text: str) -> bytes:
    """Encode a string of ASCII characters, without NUL."""
    if not text.isascii() or "\0" in text:
        raise ValueError(f"{text!r} is no ASCII string")
    return b"\x0d" + text.encode() + b"\0"


def name_path(path: str) -> bytes:
    r"""Encode a name such as ``_HID`` or ``\_SB.PCI0``; segments are padded with ``_``."""
    root, rest = (b"\\", path[1:]) if path.startswith("\\") else (b"", path)
    segments = rest.split(".") if rest else []
    for segment in segments:
        if not _SEGMENT.fullmatch(segment):
            raise ValueError(f"{path!r} is no name of the ACPI namespace")
    if not root and not segments:
        raise ValueError("a name is empty")
    encoded = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    if len(segments) == 0:
        return root + b"\0"
    if len(segments) == 1:
        return root + encoded
    if len(segments) == 2:
        return root + b"\x2e" + encoded
    if len(segments) > 255:
        raise ValueError("a name has more than 255 segments")
    return root + b"\x2f" + bytes((len(segments),)) + encoded


def package_length(content: int) -> bytes:
    """Encode the length of ``content`` bytes and of itself, as it stands before them (§20.2.4)."""
    if content + 1 < 1 << 6:
        return bytes((content + 1,))
    for more in (1, 2, 3):
        total = content + 1 + more
        if total < 1 << 4 + 8 * more:
            return bytes((more << 6 | total & 0xF,)) + (total >> 4).to_bytes(more, "little")
    raise ValueError(f"{content} bytes are more than {_MAX_PACKAGE_LENGTH}")


def _sized(opcode: bytes, content: bytes) -> bytes:
    return opcode + package_length(len(content)) + content


def name(path: str, value: bytes) -> bytes:
    """``Name(path, value)``."""
    return b"\x08" + name_path(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """``Scope(path) {terms}``."""
    return _sized(b"\x10", name_path(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """``Device(path) {terms}``."""
    return _sized(b"\x5b\x82", name_path(path) + b"".join(terms))


def package(*items: bytes) -> bytes:
    """``Package() {items}``, at most 255 of them."""
    if len(items) > 255:
        raise ValueError("a package has more than 255 items")
    return _sized(b"\x12", bytes((len(items),)) + b"".join(items))


def buffer(data: bytes) -> bytes:
    """``Buffer() {data}``."""
    return _sized(b"\x11", integer(len(data)) + data)


def eisa_id(text: str) -> bytes:
    """Encode a plug-and-play identifier such as ``PNP0501``, as the integer that stands for it."""
    if not _EISA_ID.fullmatch(text):
        raise ValueError(f"{text!r} is no EISA identifier")
    first, second, third = (ord(letter) - 0x40 for letter in text[:3])
    letters = first << 10 | second << 5 | third
    packed = (letters << 16 | int(text[3:], 16)).to_bytes(4, "big")
    return integer(int.from_bytes(packed, "little"))


def resources(*descriptors: bytes) -> bytes:
    """``ResourceTemplate() {descriptors}``."""
    # A checksum of zero stands for "not computed".
    return buffer(b"".join(descriptors) + b"\x79\0")


def io_ports(first: int, length: int) -> bytes:
    """Fixed I/O ports, all 16 bits of them decoded (§6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, length)


def irq(number: int) -> bytes:
    """Describe an edge-triggered, active-high interrupt of 0 to 15 (§6.4.2.1)."""
    return struct.pack("<BH", 0x22, 1 << number)


def memory(start: int, length: int) -> bytes:
    """Describe a fixed range below 4 GiB that a device has for itself, writable (§6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, start, length)


def bus_numbers(first: int, last: int) -> bytes:
    """Describe the buses behind a host bridge (§6.4.3.5.3)."""
    return struct.pack(
        "<BHBBBHHHHH", 0x88, 13, _TYPE_BUS, _FIXED, 0, 0, first, last, 0, last - first + 1
    )


def window_32(start: int, length: int) -> bytes:
    """Memory that a bridge passes on, below 4 GiB (§6.4.3.5.2)."""
    fields = (_TYPE_MEMORY, _FIXED, _READ_WRITE, 0, start, start + length - 1, 0, length)
    return struct.pack("<BHBBBIIIII", 0x87, 23, *fields)


def window_64(start: int, length: int) -> bytes:
    """Memory that a bridge passes on, anywhere (§6.4.3.5.1)."""
    fields = (_TYPE_MEMORY, _FIXED, _READ_WRITE, 0, start, start + length - 1, 0, length)
    return struct.pack("<BHBBBQQQQQ", 0x8A, 43, *fields)
