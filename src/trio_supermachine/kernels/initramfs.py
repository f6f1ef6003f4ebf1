"""The initramfs: an uncompressed cpio archive, which costs the kernel no time to unpack."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from typing import Final

from .modules import Module

#: The version of the layout below. It is a part of the names of cached files.
LAYOUT: Final = 1

_CONSOLE: Final = (5, 1)  # the kernel opens /dev/console for init before anything is mounted


def build_initramfs(init: bytes, modules: Sequence[Module] = ()) -> bytes:
    """Make an archive with ``/init``, ``/dev/console`` and, if there are modules, ``/modules``.

    That has each module as ``NAME.ko``, and ``order``: the files' names, one a line, in the order
    in which init loads them.
    """
    archive = _Archive()
    archive.add("dev", stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=_CONSOLE)
    archive.add("init", stat.S_IFREG | 0o755, init)
    if modules:
        archive.add("modules", stat.S_IFDIR | 0o755)
        for module in modules:
            archive.add(f"modules/{module.name}.ko", stat.S_IFREG | 0o644, module.data)
        order = "".join(f"{module.name}.ko\n" for module in modules)
        archive.add("modules/order", stat.S_IFREG | 0o644, order.encode())
    return archive.finish()


class _Archive:
    """A cpio archive in format "newc".

    See Documentation/driver-api/early-userspace/buffer-format.rst.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def add(
        self, name: str, mode: int, data: bytes = b"", *, device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        raw = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(raw), 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields)
        self._data += raw
        self._pad()
        self._data += data
        self._pad()

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._data)

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)
