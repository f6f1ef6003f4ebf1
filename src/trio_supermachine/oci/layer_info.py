"""Facts about a layer that was read, which the layers above it need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import attrs


@attrs.frozen
class DirectoryInfo:
    """The attributes of a directory."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    xattrs: Mapping[bytes, bytes] = attrs.Factory(dict)


@attrs.frozen
class Link:
    """A symbolic link in the place of a directory."""

    target: bytes


@attrs.frozen
class LayerInfo:
    """Facts about a layer. Paths are clean, and the root is ``b""``.

    :ivar directories: the directories that have an entry of their own.
    :ivar implied: the directories that have none. Their attributes come from the layers below.
    :ivar root_opaque: whether the layer hides all layers below.
    :ivar links: the layer's symbolic links, and their targets.
    :ivar hidden: the layer's whiteouts; and its opaque directories, with a slash after them.
    :ivar followed: the links of the layers below through which the layer has entries.
    """

    directories: Mapping[bytes, DirectoryInfo]
    implied: tuple[bytes, ...]
    root_opaque: bool
    links: Mapping[bytes, bytes] = attrs.Factory(dict)
    hidden: frozenset[bytes] = frozenset()
    followed: tuple[bytes, ...] = ()

    def find(self, path: bytes) -> DirectoryInfo | Link | None:
        """Find the directory with attributes, or the link, that the layer has at ``path``."""
        if (target := self.links.get(path)) is not None:
            return Link(target)
        return self.directories.get(path)

    def hides(self, path: bytes) -> bool:
        """Give whether this layer hides the ``path`` of the layers below."""
        return hides(self.hidden, path)


def hides(hidden: Collection[bytes], path: bytes) -> bool:
    """Give whether marks, as in :attr:`LayerInfo.hidden`, hide ``path`` or a directory above it."""
    while hidden and path:
        if hides_here(hidden, path):
            return True
        path = path.rpartition(b"/")[0]
    return False


def hides_here(hidden: Collection[bytes], path: bytes) -> bool:
    """Give whether a mark hides ``path`` itself, or the content of the directory that it is in."""
    return path in hidden or path.rpartition(b"/")[0] + b"/" in hidden


#: Finds what the layers below have in the place of an implied directory.
Resolve = Callable[[bytes], DirectoryInfo | Link]
