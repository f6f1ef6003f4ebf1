"""Filter of a layer's tar stream: ``sqfstar`` makes an overlayfs layer of its output.

The first pass over the stream builds the layer's tree, and writes files as they come. Directories
and whiteouts follow at the end, when their final attributes are known. Of two entries with the same
name ``sqfstar`` keeps the first, but tar keeps the last. So when a later entry changes something
that is already written, the output ends with :class:`Conflict`, though the pass reads on; and a
second pass, which knows the final tree, writes the last entries only.

Image layers (OCI image specification, layer filesystem changesets) and overlayfs layers differ:

- ``.wh.NAME`` becomes a character device 0:0, unless the layer has ``NAME``, too. Then the layer's
  own ``NAME`` stays, and becomes opaque if it is a directory.
- ``.wh..wh..opq`` becomes ``trusted.overlay.opaque=y`` on its directory. In the root it is noted in
  :class:`LayerInfo`, since layers below such a root need not be mounted at all.
- A directory with whiteouts gets ``trusted.overlay.origin``. Overlayfs would list the whiteouts
  otherwise, if no layer below has that directory: it expects none in a directory that it does not
  merge.
- Other names with ``.wh..wh.`` (AUFS's own) are left out, and so are ``trusted.overlay.*``
  attributes and character devices 0:0, which overlayfs would take for its own marks.
- An entry below a symbolic link of the layers below, such as ``bin/tool`` over
  ``bin -> usr/bin``, goes where the link leads: a directory in its place would hide the link. A
  layer's own links are never followed.

A hostile layer cannot leave its root: names with ``..`` are refused, links are followed within the
root, and hard links lead to files of the same layer only. The number of entries, the bytes of all
names, of all files and of attributes, and the links on one path are bounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import attrs

from . import MalformedError, tar
from .layer_info import DirectoryInfo, LayerInfo, Link, Resolve, hides, hides_here
from .names import MAX_NAME, MAX_PATH, clean, join, show_name
from .tar import Entry, TarReader

MAX_ENTRIES = 2_000_000
MAX_NAMES = 1 << 29  # bytes of all names in a layer, with their directories
MAX_XATTRS = 1 << 16  # bytes of names and values on one inode
_MAX_TIME = (1 << 32) - 1
_WHITEOUT = b".wh."
_AUFS = b".wh..wh."
_OPAQUE_MARK = b".wh..wh..opq"
_OPAQUE = b"trusted.overlay.opaque"
_ORIGIN = b"trusted.overlay.origin"
_MAX_LINKS = 40  # Linux's own limit on one path
_KNOWN_XATTRS = (b"user.", b"trusted.", b"security.")


class Conflict(Exception):
    """Something was written that a later entry changes: a second pass has to write the layer."""


class Sink(ABC):
    """A receiver of the filtered tar stream."""

    @abstractmethod
    def begin(self, root: DirectoryInfo) -> None:
        """Take the attributes of the root directory, before anything is written."""

    @abstractmethod
    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the stream."""


@attrs.define
class _Node:
    directory: bool
    inode: int  # the number of the entry that made it; -1 for an implied directory
    children: int = 0
    opaque: bool = False
    info: DirectoryInfo | None = None
    target: bytes | None = None  # a symbolic link's


class LayerFilter:
    """The two passes over one layer.

    :param limit: the most bytes of all files together, holes included.
    :param resolve: finds what the layers below have in the place of a directory that this layer
        implies: a directory's attributes, or a link.
    """

    def __init__(self, limit: int, resolve: Resolve) -> None:
        self._limit = limit
        self._resolve = resolve
        self._nodes: dict[bytes, _Node] = {b"": _Node(True, -1)}
        self._names = 0  # bytes in the names of all nodes
        self._first: dict[int, bytes] = {}  # an inode's name in the output
        self._whiteouts: set[bytes] = set()
        self._hidden: set[bytes] = set()  # as in LayerInfo
        self._followed: dict[bytes, bytes] = {}
        self._root: DirectoryInfo | None = None

    def first_pass(self, reader: TarReader, sink: Sink) -> None:
        """Read the whole layer, and write it on the way.

        :raises Conflict: the layer was read to its end, but a second pass has to write it.
        """
        conflict = False
        expanded = 0
        for number, entry in enumerate(reader):
            if number >= MAX_ENTRIES:
                raise MalformedError(f"a layer has more than {MAX_ENTRIES} entries")
            expanded += entry.size + tar.BLOCK
            if expanded > self._limit:
                raise MalformedError(f"a layer is larger than the limit of {self._limit} bytes")
            path = self._admit(entry)
            if path is None:
                continue
            conflict = self._place(number, path, entry) or conflict
            if not conflict and entry.type != tar.DIRECTORY:
                self._begin(sink)
                self._emit(reader, sink, path, entry)
            conflict = conflict or (self._root is not None and self._root != self._info(b""))
        if conflict:
            raise Conflict
        self._finish(sink)

    def second_pass(self, reader: TarReader, sink: Sink) -> None:
        """Write the layer whose final tree the first pass found."""
        names: dict[int, list[bytes]] = {}
        for path, node in self._nodes.items():
            if not node.directory:
                names.setdefault(node.inode, []).append(path)
        self._root = None
        self._begin(sink)
        for number, entry in enumerate(reader):
            if not (survivors := names.pop(number, None)):
                continue
            sanitise(entry)
            first = survivors[0]
            self._emit(reader, sink, first, entry)
            for other in survivors[1:]:
                sink.write(tar.header(attrs.evolve(_as_link(entry, first), name=other)))
        self._finish(sink)

    def info(self) -> LayerInfo:
        """Describe the layer, after the first pass."""
        return LayerInfo(
            {path: n.info for path, n in self._nodes.items() if n.info is not None},
            tuple(p for p, n in self._nodes.items() if n.directory and n.info is None),
            self._nodes[b""].opaque,
            {path: n.target for path, n in self._nodes.items() if n.target is not None},
            frozenset(self._hidden),
            tuple(sorted(self._followed)),
        )

    def _admit(self, entry: Entry) -> bytes | None:
        """Give the clean path of an entry, with its parents made; ``None`` for a mere mark."""
        path = clean(entry.name)
        parent, _, name = path.rpartition(b"/")
        if name.startswith(_WHITEOUT) or b"/" + _WHITEOUT in b"/" + parent:
            self._mark(path)
            return None
        if path:
            parent = self._real(parent)
            self._parent(parent)
            path = join(parent, name)
        if entry.type == tar.CHAR and entry.device == (0, 0):
            return None
        if entry.type == tar.LINK:
            self._resolve_link(entry)
        elif entry.type not in (
            tar.FILE,
            tar.DIRECTORY,
            tar.SYMLINK,
            tar.CHAR,
            tar.BLOCKDEV,
            tar.FIFO,
        ):
            raise MalformedError(f"{show_name(path)} has the unknown type {entry.type!r}")
        if entry.type == tar.SYMLINK and not 0 < len(entry.linkname) < MAX_PATH:
            raise MalformedError(f"the symbolic link {show_name(path)} has no proper target")
        if b"\0" in entry.linkname:
            raise MalformedError(f"the link {show_name(path)} has a NUL in its target")
        if not path and entry.type != tar.DIRECTORY:
            raise MalformedError("the layer's root is not a directory")
        sanitise(entry)
        return path

    def _mark(self, path: bytes) -> None:
        """Take note of a whiteout."""
        parts = path.split(b"/")
        if any(part.startswith(_AUFS) for part in parts[:-1]):
            return
        if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
            raise MalformedError(f"{show_name(path)} is below a whiteout")
        parent, name = self._real(b"/".join(parts[:-1])), parts[-1]
        if not name.startswith(_WHITEOUT) or not self._nearest(parent).directory:
            return  # umoci also writes whiteouts below a directory that the layer replaces
        if name == _OPAQUE_MARK:
            self._parent(parent).opaque = True
            self._hidden.add(parent + b"/")
        elif not name.startswith(_AUFS):
            hidden = name[len(_WHITEOUT) :]
            if hidden in (b"", b".", b".."):
                raise MalformedError(f"the whiteout {show_name(path)} names no file")
            self._parent(parent)
            self._whiteouts.add(join(parent, hidden))
            self._hidden.add(join(parent, hidden))

    def _real(self, path: bytes) -> bytes:
        """Follow the links of the layers below on the way to the directory ``path``.

        Like the kernel in a chroot, do not leave the root.
        """
        if path in self._nodes:
            return path
        real, left, links = b"", path.split(b"/")[::-1], 0
        hidden = False  # whether the layers below cannot be seen at ``real``
        while left:
            part = left.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                real = real.rpartition(b"/")[0]
                hidden = hides(self._hidden, real)
                continue
            at = join(real, part)
            hidden = hidden or hides_here(self._hidden, at)
            target = None if hidden else self._link_below(at)
            if target is None:
                real = at
                continue
            links += 1
            if links > _MAX_LINKS or len(left) > MAX_PATH:
                raise MalformedError(f"{show_name(path)} leads through too many links")
            if target.startswith(b"/"):
                real = b""
            left += target.split(b"/")[::-1]
        return clean(real)

    def _link_below(self, path: bytes) -> bytes | None:
        if path in self._nodes:
            return None
        if path not in self._followed:
            found = self._resolve(path)
            if not isinstance(found, Link):
                return None
            self._followed[path] = found.target
        return self._followed[path]

    def _nearest(self, path: bytes) -> _Node:
        """Find the node of ``path``, or the nearest one above it."""
        while (node := self._nodes.get(path)) is None:
            path = path.rpartition(b"/")[0]
        return node

    def _parent(self, path: bytes) -> _Node:
        """Give the node of the directory ``path``. Make it, and those above it, if need be."""
        node = self._nodes.get(path)
        if node is None:
            above = path.rpartition(b"/")[0]
            self._parent_of_new(above)
            node = self._add(path, _Node(True, -1))
        elif not node.directory:
            raise MalformedError(f"{show_name(path)} is no directory, but has entries below it")
        return node

    def _parent_of_new(self, above: bytes) -> None:
        missing = []
        while (node := self._nodes.get(above)) is None:
            missing.append(above)
            above = above.rpartition(b"/")[0]
        if not node.directory:
            raise MalformedError(f"{show_name(above)} is no directory, but has entries below it")
        for path in reversed(missing):
            node.children += 1
            node = self._add(path, _Node(True, -1))
        node.children += 1

    def _add(self, path: bytes, node: _Node) -> _Node:
        self._names += len(path)
        if len(self._nodes) > 2 * MAX_ENTRIES or self._names > MAX_NAMES:
            raise MalformedError("a layer has or implies too many names")
        self._nodes[path] = node
        return node

    def _place(self, number: int, path: bytes, entry: Entry) -> bool:
        """Put an entry into the tree. Give whether that changes something that may be written."""
        old = self._nodes.get(path)
        if entry.type == tar.DIRECTORY:
            info = DirectoryInfo(entry.mode, entry.uid, entry.gid, entry.mtime, entry.xattrs)
            if old is not None and old.directory:
                old.info = info
                return False
            self._count(path, old)
            self._add(path, _Node(True, -1, info=info))
            return old is not None
        if old is not None and old.directory and (old.children or not path):
            raise MalformedError(f"{show_name(path)} is a directory first, and then is not")
        target = entry.linkname if entry.type == tar.SYMLINK else None
        if entry.type == tar.LINK:
            number = self._nodes[entry.linkname].inode
            target = self._nodes[entry.linkname].target
            if old is not None and old.inode == number:
                return True  # a link to itself, which must not be written
        self._count(path, old)
        self._add(path, _Node(False, number, target=target))
        if entry.type == tar.LINK:
            entry.linkname = self._first[number]
        else:
            self._first[number] = path
        return old is not None and not old.directory

    def _count(self, path: bytes, old: _Node | None) -> None:
        if old is None and path:
            self._nodes[path.rpartition(b"/")[0]].children += 1

    def _resolve_link(self, entry: Entry) -> None:
        parent, _, name = clean(entry.linkname).rpartition(b"/")
        target = join(self._real(parent), name)
        node = self._nodes.get(target)
        if node is None or node.directory:
            what = "a directory" if node else "not in the layer before it"
            raise MalformedError(
                f"the hard link {show_name(entry.name)} has the target {show_name(target)},"
                f" which is {what}"
            )
        entry.linkname = target

    def _info(self, path: bytes) -> DirectoryInfo:
        if (info := self._nodes[path].info) is not None:
            return info
        found = DirectoryInfo() if hides(self._whiteouts, path) else self._resolve(path)
        return found if isinstance(found, DirectoryInfo) else DirectoryInfo()

    def _begin(self, sink: Sink) -> None:
        if self._root is None:
            self._root = self._info(b"")
            sink.begin(self._root)

    def _emit(self, reader: TarReader, sink: Sink, path: bytes, entry: Entry) -> None:
        entry.name = path
        sink.write(tar.header(entry))
        if entry.size:
            for chunk in reader.body():
                sink.write(chunk)
            sink.write(bytes(-entry.size % tar.BLOCK))

    def _finish(self, sink: Sink) -> None:
        self._begin(sink)
        hidden = sorted(
            path
            for path in self._whiteouts
            if path not in self._nodes and self._nearest(path).directory
        )
        marked = {path.rpartition(b"/")[0] for path in hidden}
        for path, node in self._nodes.items():
            if node.directory and path:
                info = self._info(path)
                xattrs = dict(info.xattrs)
                if node.opaque or path in self._whiteouts:
                    xattrs[_OPAQUE] = b"y"
                if path in marked:
                    xattrs[_ORIGIN] = b""
                entry = Entry(
                    path,
                    tar.DIRECTORY,
                    info.mode,
                    info.uid,
                    info.gid,
                    mtime=info.mtime,
                    xattrs=xattrs,
                )
                sink.write(tar.header(entry))
        for path in hidden:
            sink.write(tar.header(Entry(path, tar.CHAR, 0)))
        sink.write(bytes(2 * tar.BLOCK))


def _as_link(entry: Entry, target: bytes) -> Entry:
    return Entry(b"", tar.LINK, entry.mode, entry.uid, entry.gid, 0, entry.mtime, target)


def sanitise(entry: Entry) -> None:
    """Reduce an entry to the times and extended attributes that squashfs and overlayfs take.

    :raises MalformedError: the attributes are too large, or have no proper names.
    """
    entry.mtime = min(max(entry.mtime, 0), _MAX_TIME)
    if entry.xattrs:
        if sum(len(k) + len(v) for k, v in entry.xattrs.items()) > MAX_XATTRS:
            raise MalformedError(f"{show_name(entry.name)} has too large extended attributes")
        entry.xattrs = dict(_kept(entry.xattrs))


def _kept(xattrs: Mapping[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
    for key, value in xattrs.items():
        if b"\0" in key or len(key) > MAX_NAME:
            raise MalformedError(f"the extended attribute {show_name(key)} has no proper name")
        if key.startswith(_KNOWN_XATTRS) and not key.startswith(b"trusted.overlay."):
            yield key, value
