"""What is known of a layer once it was read, for the layers above it."""

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
    """A symbolic link that is met where a directory is needed."""

    target: bytes


@attrs.frozen
class LayerInfo:
    """What the layers above and the image need to know of a layer.

    ``directories`` are those with an entry of their own, ``implied`` those without, whose
    attributes come from the layers below; the root is ``b""``. ``links`` are the layer's symbolic
    links and their targets, ``hidden`` its whiteouts, and its opaque directories with a slash
    after them; ``followed`` are the links of the layers below through which it has entries.
    """

    directories: Mapping[bytes, DirectoryInfo]
    implied: tuple[bytes, ...]
    root_opaque: bool
    links: Mapping[bytes, bytes] = attrs.Factory(dict)
    hidden: frozenset[bytes] = frozenset()
    followed: tuple[bytes, ...] = ()

    def find(self, path: bytes) -> DirectoryInfo | Link | None:
        """What the layer has at ``path``, if that is a directory with attributes or a link."""
        if (target := self.links.get(path)) is not None:
            return Link(target)
        return self.directories.get(path)

    def hides(self, path: bytes) -> bool:
        """Whether ``path`` in the layers below cannot be seen above this one."""
        return hides(self.hidden, path)


def hides(hidden: Collection[bytes], path: bytes) -> bool:
    """Whether whiteouts and opaque directories, as in :class:`LayerInfo`, hide ``path``."""
    while hidden and path:
        if hides_here(hidden, path):
            return True
        path = path.rpartition(b"/")[0]
    return False


def hides_here(hidden: Collection[bytes], path: bytes) -> bool:
    """The same, of nothing but ``path`` itself and the directory that it is in."""
    return path in hidden or path.rpartition(b"/")[0] + b"/" in hidden


#: What the layers below have where a directory is implied.
Resolve = Callable[[bytes], DirectoryInfo | Link]
