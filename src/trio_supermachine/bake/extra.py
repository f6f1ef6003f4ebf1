"""Files that a bake adds to its image: one more layer, on top of the image's own.

In overlayfs a directory has the attributes that the topmost layer gives it, and a directory over
a symbolic link hides it. So the added layer must repeat the directories on the way to each file
as the layers below have them, and must put a file where a link on its way leads.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from .._util import validators as check
from .._util.process import run_process
from ..errors import ConfigError
from ..images.layers import ImageStore
from ..oci import tar
from ..oci.layer import Sink
from ..oci.layer_info import DirectoryInfo
from ..oci.squashfs import find_tool
from ..oci.tar import Entry

_RECIPE: Final = b"1"  # changes whenever what is made of the same files does
_MAX_LINKS: Final = 40  # as Linux has it
_TYPES: Final = {"d": stat.S_IFDIR, "l": stat.S_IFLNK, "c": stat.S_IFCHR}
#: "drwxr-xr-x 0/0    42 1970-01-01 00:00 squashfs-root/etc"; a link's target comes after " -> ",
#: and a device has its two numbers in place of a size.
_LINE: Final = re.compile(
    rb"([-a-z][-a-zST]{9}) (\d+)/(\d+) +(?:\d+, *)?\d+ [\d-]{10} \d\d:\d\d (squashfs-root.*)",
    re.DOTALL,
)
#: Where the guest mounts file systems of its own.
_MOUNTED: Final = ("/dev", "/proc", "/sys")


def _path(value: check.StrPath) -> str:
    path = check.guest_path(value)
    if posixpath.normpath(path) != path or path == "/" or path.startswith("//"):
        raise ConfigError(f"an extra file's path must be plain and absolute, not {path!r}")
    if any(path == top or path.startswith(top + "/") for top in _MOUNTED):
        raise ConfigError(f"the guest mounts its own file systems over {path!r}")
    if len(os.fsencode(path)) > 4000:
        raise ConfigError("an extra file's path is too long")
    return path


def _data(value: object) -> bytes:
    if isinstance(value, str):
        raise ConfigError("an extra file's data must be bytes; encode the text")
    if not isinstance(value, bytes | bytearray | memoryview):
        raise ConfigError(f"an extra file's data must be bytes, not {type(value).__name__}")
    return bytes(value)


@attrs.frozen
class ExtraFile:
    """A file for the guest, owned by root."""

    path: str = attrs.field(converter=_path)
    data: bytes = attrs.field(converter=_data, repr=False)
    mode: int = attrs.field(default=0o644)

    @mode.validator
    def _check_mode(self, field: attrs.Attribute[Any], value: object) -> None:
        check.integer("mode", value, 0, 0o7777)

    def digest(self) -> bytes:
        """Digest the path, the mode and the content."""
        head = repr((self.path, self.mode)).encode()
        return hashlib.sha256(head + hashlib.sha256(self.data).digest()).digest()


async def extra_layer(
    store: ImageStore, layers: Sequence[Path], digests: Sequence[str], files: Sequence[ExtraFile]
) -> Path:
    """Give the squashfs file of a layer with ``files`` above ``layers``, made unless it is there.

    :param digests: those of the layers' files.
    :raises ConfigError: the image has no directory where a file should go.
    """
    parts = [_RECIPE, *(digest.encode() for digest in digests), *(f.digest() for f in files)]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    if (known := store.find_made("files", key)) is not None:
        return known
    below = _Below(layers)
    directories: dict[str, DirectoryInfo] = {}
    placed: dict[str, ExtraFile] = {}
    for file in files:
        place = await below.place(file.path, directories)
        placed[place] = file
    if clash := directories.keys() & placed.keys():
        raise ConfigError(f"{'/' + min(clash)!r} is an extra file and a directory of another")
    root = await below.find("")
    attributes = root.info if root is not None else DirectoryInfo()
    return await store.made("files", key, lambda s: _write(s, attributes, directories, placed))


def _write(
    sink: Sink,
    root: DirectoryInfo,
    directories: Mapping[str, DirectoryInfo],
    files: Mapping[str, ExtraFile],
) -> None:
    sink.begin(root)
    for path, info in sorted(directories.items()):
        entry = Entry(os.fsencode(path), tar.DIRECTORY, info.mode, info.uid, info.gid)
        sink.write(tar.header(entry))
    for path, file in sorted(files.items()):
        size = len(file.data)
        sink.write(tar.header(Entry(os.fsencode(path), tar.FILE, file.mode, size=size)))
        sink.write(file.data)
        sink.write(bytes(-size % tar.BLOCK))
    sink.write(bytes(2 * tar.BLOCK))


@attrs.frozen
class _Found:
    kind: int
    info: DirectoryInfo
    target: str = ""


class _Below:
    """The files of the layers below. A path has no leading slash; that of the root is empty."""

    def __init__(self, layers: Iterable[Path]) -> None:
        self._layers = tuple(layers)
        self._tool = find_tool("unsquashfs")
        self._known: dict[str, _Found | None] = {}

    async def place(self, path: str, directories: dict[str, DirectoryInfo]) -> str:
        """Follow the links on the way to ``path``, and note the directories there.

        :returns: the path that a file of this name really has.
        """
        *todo, name = path.lstrip("/").split("/")
        here: list[str] = []
        hops = 0
        while todo:
            part = todo.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                del here[-1:]
                continue
            at = "/".join((*here, part))
            found = await self.find(at)
            if found is not None and found.kind == stat.S_IFLNK:
                hops += 1
                if hops > _MAX_LINKS:
                    raise ConfigError(f"too many symbolic links on the way to {path!r}")
                if found.target.startswith("/"):
                    here = []
                todo = found.target.split("/") + todo
                continue
            if found is not None and found.kind != stat.S_IFDIR:
                raise ConfigError(f"the image's {'/' + at!r} is no directory, so no {path!r}")
            here.append(part)
        for depth in range(len(here)):
            at = "/".join(here[: depth + 1])
            found = await self.find(at)
            directories[at] = found.info if found is not None else DirectoryInfo()
        place = "/".join((*here, name))
        found = await self.find(place)
        if found is not None and found.kind == stat.S_IFDIR:
            raise ConfigError(f"{path!r} is a directory in the image")
        return place

    async def find(self, path: str) -> _Found | None:
        """Give the topmost layer's entry for a path; ``None`` if it has none, or deletes it."""
        if path not in self._known:
            self._known[path] = await self._look(path)
        return self._known[path]

    async def _look(self, path: str) -> _Found | None:
        for layer in reversed(self._layers):
            if (found := await self._listed(layer, path)) is not None:
                deleted = found.kind == stat.S_IFCHR  # a whiteout, or a device: no directory
                return None if deleted else found
        return None

    async def _listed(self, layer: Path, path: str) -> _Found | None:
        depth = str(path.count("/") + 1 if path else 0)
        command = [self._tool, "-no-wildcards", "-max-depth", depth, "-lln", os.fspath(layer)]
        done = await run_process([*command, path] if path else command, capture_stdout=True)
        name = os.fsencode("squashfs-root" + ("/" + path if path else ""))
        for line in done.stdout.split(b"\n"):
            match = _LINE.fullmatch(line)
            if match and (match[4] == name or match[4].startswith(name + b" -> ")):
                return _entry(match, match[4][len(name) + 4 :])
        return None


def _entry(match: re.Match[bytes], target: bytes) -> _Found:
    mode = match[1].decode()
    bits = 0
    for position, letter in enumerate(mode[1:]):
        bits |= 0o400 >> position if letter in "rwxst" else 0
        if letter in "sStT":  # set-user-id, set-group-id, sticky
            bits |= (0o4000, 0o2000, 0o1000)[position // 3]
    info = DirectoryInfo(bits, int(match[2]), int(match[3]))
    return _Found(_TYPES.get(mode[0], stat.S_IFREG), info, os.fsdecode(target))
