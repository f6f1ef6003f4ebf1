"""Tar archives, read and written as far as image layers need it.

Read are POSIX ustar and pax, the long names and sparse files of GNU tar, and the headers of tar
before POSIX. Written are ustar, and pax for what does not fit.

Layers are not trusted, and another tar reader, ``sqfstar``, reads them next. The standard library's
module does not fit: it reads an extended header of any size into memory, and headers that it passed
through might mean something else to the next reader. Here every length is bounded before it is
read, and headers are written anew.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from typing import Protocol

import attrs

from . import MalformedError

BLOCK = 512
MAX_EXTENDED = 1 << 20  # bytes of one PAX or GNU extended header
MAX_SPARSE = 1 << 16  # segments of a sparse file
CHUNK = 1 << 18

FILE, LINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_CONTIGUOUS, _OLD_FILE = b"7", b"\0"
_GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE = b"L", b"K", b"S"
_PAX, _PAX_GLOBAL = b"x", b"g"
_NO_BODY = (LINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO)

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_XATTR = b"SCHILY.xattr."
_SPACES = b" " * 8


@attrs.define(slots=True)
class Entry:
    """A member of an archive.

    :ivar size: the bytes of its body, with its holes.
    """

    name: bytes
    type: bytes
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    linkname: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = attrs.Factory(dict)


class Source(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Give the next bytes, at most ``size``; none says that the stream has ended."""


class TarReader:
    """An iterator over the entries of a tar stream.

    :param skip: passes over so many bytes of the stream, faster than to read them; may be ``None``.
    """

    def __init__(self, source: Source, skip: Callable[[int], None] | None = None) -> None:
        self._source = source
        self._skip = skip
        self._buffer = b""
        self._position = 0
        self._left = 0  # stored bytes of the current body not yet read
        self._padding = 0
        self._size = 0
        self._sparse: list[tuple[int, int]] | None = None
        self._global: dict[bytes, bytes] = {}
        #: Bytes of the stream that have been read.
        self.offset: int = 0
        #: Where the current entry's stored body begins, counted from the stream's start.
        self.body_offset: int = 0

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self._next()) is not None:
            yield entry

    def body(self) -> Iterator[bytes | memoryview]:
        """Give the bytes of the current entry; holes are zeros."""
        if self._sparse is None:
            yield from self._stored(self._size)
            return
        position = 0
        for start, length in self._sparse:
            yield from _zeros(start - position)
            yield from self._stored(length)
            position = start + length
        yield from _zeros(self._size - position)

    def _next(self) -> Entry | None:
        self._discard(self._left)
        # Go's writers (umoci) may leave out what pads the last body; Go's reader takes that.
        self._read(self._padding)
        self._left = self._padding = 0
        pax = self._global
        long_name = long_link = None
        for _ in range(16):
            header = self._header()
            if header is None:
                if pax is not self._global or long_name is not None or long_link is not None:
                    raise MalformedError("the tar stream ends after an extended header")
                return None
            fields = _HEADER.unpack(header)
            type_ = fields[7]
            size = _number(fields[4], "size")
            if type_ in (_PAX, _PAX_GLOBAL):
                records = _pax_records(self._extended(size))
                if type_ == _PAX:
                    pax = {**pax, **records}
                else:
                    self._global.update(records)
                    if sum(len(k) + len(v) for k, v in self._global.items()) > MAX_EXTENDED:
                        raise MalformedError("the global headers are too large")
                    pax = {**self._global, **(pax if pax is not self._global else {})}
            elif type_ == _GNU_LONG_NAME:
                long_name = self._extended(size).split(b"\0", 1)[0]
            elif type_ == _GNU_LONG_LINK:
                long_link = self._extended(size).split(b"\0", 1)[0]
            else:
                return self._entry(header, fields, size, pax, long_name, long_link)
        raise MalformedError("too many extended headers in a row")

    def _entry(
        self,
        header: bytes,
        fields: tuple[bytes, ...],
        size: int,
        pax: dict[bytes, bytes],
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> Entry:
        type_ = fields[7]
        name = _text(fields[0])
        if fields[9].startswith(b"ustar\x00") and (prefix := _text(fields[14])):
            name = prefix + b"/" + name
        entry = Entry(
            name=name if long_name is None else long_name,
            type=type_,
            mode=_number(fields[1], "mode") & 0o7777,
            uid=_number(fields[2], "uid"),
            gid=_number(fields[3], "gid"),
            size=size,
            mtime=_number(fields[5], "mtime", signed=True),
            linkname=_text(fields[8]) if long_link is None else long_link,
        )
        if type_ in (CHAR, BLOCKDEV):
            entry.device = (_number(fields[12], "major"), _number(fields[13], "minor"))
            if entry.device[0] >= 1 << 12 or entry.device[1] >= 1 << 20:
                raise MalformedError("a device's number is out of range")
        if type_ in (_OLD_FILE, _CONTIGUOUS):
            # Before POSIX a directory was a file whose name ends in a slash.
            entry.type = DIRECTORY if name.endswith(b"/") else FILE
        stored = size
        if pax:
            stored = _apply_pax(entry, pax)
        if not (0 <= entry.uid < 1 << 32 and 0 <= entry.gid < 1 << 32):
            raise MalformedError("an owner's number is out of range")
        if entry.type in _NO_BODY:
            # A hard link may carry its file's size, without the bytes; POSIX lets the others too.
            stored = entry.size = 0
        self._sparse = None
        if entry.type == _GNU_SPARSE:
            entry.type = FILE
            self._sparse = self._old_sparse(header)
            entry.size = _number(header[483:495], "real size")
            _check_sparse(self._sparse, stored, entry.size)
        elif b"GNU.sparse.realsize" in pax or b"GNU.sparse.size" in pax:
            stored = self._pax_sparse(entry, pax, stored)
        if stored < 0 or entry.size < 0:
            raise MalformedError("a negative size")
        self._size = entry.size
        self._left = stored
        self._padding = -stored % BLOCK
        self.body_offset = self.offset
        return entry

    def _old_sparse(self, header: bytes) -> list[tuple[int, int]]:
        segments: list[tuple[int, int]] = []
        _segments(segments, header[386:482])
        more = header[482]
        while more:
            block = self._exactly(BLOCK)
            _segments(segments, block[:504])
            more = block[504]
            if len(segments) > MAX_SPARSE:
                raise MalformedError("too many segments in a sparse file")
        return segments

    def _pax_sparse(self, entry: Entry, pax: dict[bytes, bytes], stored: int) -> int:
        if b"GNU.sparse.name" in pax:
            entry.name = pax[b"GNU.sparse.name"]
        size = _decimal(pax.get(b"GNU.sparse.realsize", pax.get(b"GNU.sparse.size", b"0")))
        if pax.get(b"GNU.sparse.major") == b"1":
            # Version 1.0: the map stands before the data, in decimal lines, padded to a block.
            text = b""
            wanted: int | None = None
            while True:
                lines = text.split(b"\n")
                if wanted is None and len(lines) > 1:
                    wanted = 2 * _decimal(lines[0])
                    if wanted > 2 * MAX_SPARSE:
                        raise MalformedError("too many segments in a sparse file")
                if wanted is not None and len(lines) > wanted + 1:
                    break
                if len(text) > MAX_EXTENDED or len(text) + BLOCK > stored + BLOCK - 1:
                    raise MalformedError("a sparse file's map does not end")
                text += self._exactly(BLOCK)
            numbers = [_decimal(line) for line in lines[1 : wanted + 1]]
            stored -= len(text)
        else:
            listed = pax.get(b"GNU.sparse.map", b"")
            numbers = [_decimal(number) for number in listed.split(b",")] if listed else []
        self._sparse = list(zip(numbers[::2], numbers[1::2], strict=False))
        if len(numbers) % 2:
            raise MalformedError("a sparse file's map is odd")
        _check_sparse(self._sparse, stored, size)
        entry.size = size
        return stored

    def _header(self) -> bytes | None:
        block = self._read(BLOCK)
        if not block or (len(block) == BLOCK and not block.strip(b"\0")):
            return None
        if len(block) != BLOCK:
            raise MalformedError("the tar stream ends within a header")
        found = _number(block[148:156], "checksum")
        total = sum(block) - sum(block[148:156]) + 256
        if found != total:
            signed = total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
            if found != signed:
                raise MalformedError("a tar header's checksum is wrong")
        return block

    def _extended(self, size: int) -> bytes:
        if not 0 <= size <= MAX_EXTENDED:
            raise MalformedError(f"an extended header of {size} bytes is too large")
        data = self._exactly(size)
        self._discard(-size % BLOCK)
        return data

    def _stored(self, size: int) -> Iterator[bytes | memoryview]:
        if size > self._left:
            raise MalformedError("a body is shorter than its size")
        while size:
            chunk = self._some(size)
            if not chunk:
                raise MalformedError("the tar stream ends within a file")
            size -= len(chunk)
            self._left -= len(chunk)
            yield chunk

    def _some(self, size: int) -> bytes | memoryview:
        if self._position == len(self._buffer):
            self._buffer = self._source.read(CHUNK)
            self._position = 0
        end = min(self._position + size, len(self._buffer))
        whole = self._position == 0 and end == len(self._buffer)
        chunk = self._buffer if whole else memoryview(self._buffer)[self._position : end]
        self.offset += end - self._position
        self._position = end
        return chunk

    def _read(self, size: int) -> bytes:
        start, end = self._position, self._position + size
        if end <= len(self._buffer):
            self._position = end
            self.offset += size
            return self._buffer[start:end]
        parts = []
        while size and (chunk := self._some(size)):
            parts.append(chunk)
            size -= len(chunk)
        return b"".join(parts)

    def _exactly(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) != size:
            raise MalformedError("the tar stream ends within a header")
        return data

    def _discard(self, size: int) -> None:
        buffered = min(size, len(self._buffer) - self._position)
        self._position += buffered
        self.offset += buffered
        size -= buffered
        if size and self._skip is not None:
            self._skip(size)
            self.offset += size
            return
        while size:
            chunk = self._some(size)
            if not chunk:
                raise MalformedError("the tar stream ends within a file")
            size -= len(chunk)


def header(entry: Entry) -> bytes:
    """Make the header blocks of ``entry``: ustar, after a pax header for what does not fit."""
    pax: list[tuple[bytes, bytes]] = []
    name, linkname = entry.name, entry.linkname
    if len(name) > 100:
        pax.append((b"path", name))
        name = name[:100]
    if len(linkname) > 100:
        pax.append((b"linkpath", linkname))
        linkname = linkname[:100]
    uid, gid, size = entry.uid, entry.gid, entry.size
    if uid > 0o7777777:
        pax.append((b"uid", b"%d" % uid))
        uid = 0
    if gid > 0o7777777:
        pax.append((b"gid", b"%d" % gid))
        gid = 0
    if size > 0o77777777777:
        pax.append((b"size", b"%d" % size))
        size = 0
    pax += [(_XATTR + key, value) for key, value in entry.xattrs.items()]
    major, minor = entry.device
    block = _ustar(
        name, entry.type, entry.mode, uid, gid, size, entry.mtime, linkname, major, minor
    )
    if not pax:
        return block
    body = b"".join(_pax_record(key, value) for key, value in pax)
    extended = _ustar(b"pax", _PAX, 0o644, 0, 0, len(body), 0, b"", 0, 0)
    return extended + body + bytes(-len(body) % BLOCK) + block


def _ustar(
    name: bytes,
    type_: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    linkname: bytes,
    major: int,
    minor: int,
) -> bytes:
    block = b"%b%07o\0%07o\0%07o\0%011o\0%011o\0        %b%b" % (
        name + bytes(100 - len(name)),
        mode,
        uid,
        gid,
        size,
        mtime,
        type_,
        linkname,
    )
    block += bytes(257 - len(block)) + b"ustar\x0000" + bytes(64)
    block += b"%07o\0%07o\0" % (major, minor)
    block += bytes(BLOCK - len(block))
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _pax_record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while (total := len(rest) + len(str(length))) != length:
        length = total
    return b"%d" % length + rest


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        if space < 0:
            if not data[position:].strip(b"\0"):
                break
            raise MalformedError("a PAX record has no length")
        end = position + _decimal(data[position:space])
        equals = data.find(b"=", space, end)
        if end > len(data) or equals < 0 or data[end - 1 : end] != b"\n" or equals >= end:
            raise MalformedError("a PAX record is malformed")
        key = data[space + 1 : equals]
        value = data[equals + 1 : end - 1]
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            # Version 0.0 repeats these two; gathered, they are version 0.1's map.
            map_ = records.get(b"GNU.sparse.map")
            records[b"GNU.sparse.map"] = value if map_ is None else map_ + b"," + value
        else:
            records[key] = value
        position = end
    return records


def _apply_pax(entry: Entry, pax: dict[bytes, bytes]) -> int:
    stored = entry.size
    for key, value in pax.items():
        if not value:
            continue  # POSIX: as if there were no such record, in a global header either
        if key == b"path":
            entry.name = value
        elif key == b"linkpath":
            entry.linkname = value
        elif key == b"size":
            stored = entry.size = _decimal(value)
        elif key == b"uid":
            entry.uid = _decimal(value)
        elif key == b"gid":
            entry.gid = _decimal(value)
        elif key == b"mtime":
            entry.mtime = _seconds(value)
        elif key.startswith(_XATTR):
            entry.xattrs[key[len(_XATTR) :]] = value
    return stored


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


@functools.lru_cache(4096)
def _number(field: bytes, what: str, *, signed: bool = False) -> int:
    if field[0] in (0x80, 0xFF):  # GNU: base 256, two's complement
        value = int.from_bytes(field[1:], "big", signed=False)
        if field[0] == 0xFF:
            value -= 1 << (8 * (len(field) - 1))
        if value < 0 and not signed:
            raise MalformedError(f"a tar header's {what} is negative")
        if value.bit_length() > 63:
            raise MalformedError(f"a tar header's {what} is too large")
        return value
    text = _text(field).strip(b" ")
    if not text:
        return 0
    if text.strip(b"01234567"):
        raise MalformedError(f"a tar header's {what} is not a number")
    return int(text, 8)


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise MalformedError("an extended header's number is malformed")
    return int(text)


def _seconds(text: bytes) -> int:
    whole, _, fraction = text.partition(b".")
    digits = whole.removeprefix(b"-")
    if fraction.strip(b"0123456789"):
        raise MalformedError("an extended header's time is malformed")
    value = _decimal(digits)
    return -value if digits is not whole else value


def _segments(segments: list[tuple[int, int]], table: bytes) -> None:
    for position in range(0, len(table) - 23, 24):
        if table[position] == 0:
            break
        start = _number(table[position : position + 12], "sparse offset")
        segments.append((start, _number(table[position + 12 : position + 24], "sparse length")))


def _check_sparse(segments: list[tuple[int, int]], stored: int, size: int) -> None:
    position = 0
    for start, length in segments:
        if start < position:
            raise MalformedError("a sparse file's segments overlap")
        position = start + length
    if position > size or sum(length for _, length in segments) != stored:
        raise MalformedError("a sparse file's map does not fit its size")
    if len(segments) > MAX_SPARSE:
        raise MalformedError("too many segments in a sparse file")


_ZEROS = bytes(CHUNK)


def _zeros(size: int) -> Iterator[bytes | memoryview]:
    whole, rest = divmod(size, CHUNK)
    for _ in range(whole):
        yield _ZEROS
    if rest:
        yield memoryview(_ZEROS)[:rest]
