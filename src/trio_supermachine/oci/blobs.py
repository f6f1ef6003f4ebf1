"""Blobs of local images, in a layout's directory or in an archive that is read in place."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import NotSupported
from . import MalformedError, tar
from .decompress import Blob, opened

MAX_DOCUMENT = 8 << 20  # bytes of one JSON document
_MAX_DIGEST = 1024
_MAX_MEMBERS = 100_000
_MAX_LINKS = 16
_DIGEST = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+")
_HEX_DIGITS = {"sha256": 64, "sha384": 96, "sha512": 128}


class Files(Protocol):
    """Named files, such as ``index.json``."""

    def find(self, name: str) -> Blob | None:
        """Find the file ``name``, if it is there.

        :raises MalformedError: something else than a file is there.
        """


class Directory:
    """The files below a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, name: str) -> Blob | None:
        path = self._root / name
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:  # such as links in a circle
            raise MalformedError(f"{path} cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise MalformedError(f"{path} is not a regular file")
        return Blob(path, 0, status.st_size)


class _Raw:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def read(self, size: int, /) -> bytes:
        return self._file.read(size)

    def skip(self, size: int) -> None:
        if self._file.seek(size, os.SEEK_CUR) > self._size:
            raise MalformedError("the archive ends within a file")


class Archive:
    """The members of an uncompressed tar file, which stay where they are."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        self._members: dict[str, Blob | str] = {}
        with opened(Blob(path, 0, size)) as file:
            if file.read(3) in (b"\x1f\x8b\x08", b"BZh", b"\xfd7z", b"\x28\xb5\x2f"):
                raise MalformedError("the archive as a whole is compressed; decompress it first")
            file.seek(0)
            raw = _Raw(file, size)
            reader = tar.TarReader(raw, raw.skip)
            for entry in reader:
                if len(self._members) >= _MAX_MEMBERS:
                    raise MalformedError(f"the archive has more than {_MAX_MEMBERS} members")
                name = posixpath.normpath(os.fsdecode(entry.name))
                if entry.type == tar.FILE:
                    self._members[name] = Blob(path, reader.body_offset, entry.size)
                elif entry.type in (tar.SYMLINK, tar.LINK):
                    target = os.fsdecode(entry.linkname)
                    if entry.type == tar.SYMLINK:
                        target = posixpath.join(posixpath.dirname(name), target)
                    self._members[name] = posixpath.normpath(target)

    def find(self, name: str) -> Blob | None:
        found: Blob | str | None = posixpath.normpath(name)
        for _ in range(_MAX_LINKS):
            if not isinstance(found, str):
                return found
            found = self._members.get(found)
        raise MalformedError(f"{name!r} leads through too many links")


def read_bytes(blob: Blob) -> bytes:
    """Read a whole document.

    :raises MalformedError: it is too large.
    """
    if blob.size > MAX_DOCUMENT:
        raise MalformedError(f"a document of {blob.size} bytes is too large")
    with opened(blob) as file:
        data = os.pread(file.fileno(), blob.size, blob.offset)
    if len(data) != blob.size:
        raise MalformedError(f"{blob.path} is shorter than it was")
    return data


def read_json(data: bytes, what: str) -> Any:
    """Parse untrusted JSON in UTF-8.

    :raises MalformedError: it is no JSON.
    """
    try:
        return json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise MalformedError(f"{what} is not JSON") from None


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def as_object(document: object, what: str) -> Mapping[str, Any]:
    """Check that ``document`` is a JSON object, and return it.

    :raises MalformedError: it is not.
    """
    if not isinstance(document, dict):
        raise MalformedError(f"{what} is not a JSON object")
    return document


def as_list(document: object, what: str, limit: int) -> list[Any]:
    """Check that ``document`` is a JSON array of at most ``limit`` items, and return it.

    :raises MalformedError: it is not.
    """
    if not isinstance(document, list) or len(document) > limit:
        raise MalformedError(f"{what} is not a JSON array of at most {limit} items")
    return document


def is_digest(text: str) -> bool:
    """Give whether ``text`` is a digest by any algorithm, as OCI descriptors have them."""
    if len(text) > _MAX_DIGEST or not _DIGEST.fullmatch(text):
        return False
    algorithm, _, encoded = text.partition(":")
    digits = _HEX_DIGITS.get(algorithm)
    return digits is None or (len(encoded) == digits and not encoded.strip("0123456789abcdef"))


def as_digest(value: object, what: str) -> str:
    """Check that ``value`` is a digest by sha256, which can be verified here, and return it.

    :raises MalformedError: it is no digest.
    :raises NotSupported: it is a digest by another algorithm.
    """
    if not isinstance(value, str) or not is_digest(value):
        raise MalformedError(f"{what} is not a digest")
    if not value.startswith("sha256:"):
        raise NotSupported(
            "digests",
            f"{what} is {value[:200]}; only digests by sha256 are supported, which the tools that"
            " build images write unless told otherwise",
        )
    return value


def sha256(data: bytes) -> str:
    """Compute the digest of ``data``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
