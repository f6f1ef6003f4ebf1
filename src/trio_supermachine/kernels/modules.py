"""Kernel modules that a guest needs, with their dependencies, in the order to load them."""

from __future__ import annotations

import gzip
import lzma
import re
from pathlib import Path
from typing import Final

import attrs

from ..errors import AssetNotFound

#: Modules of a stock kernel that a guest cannot do without.
NEEDED: Final = ("virtio_blk", "squashfs", "overlay", "virtio_rng", "vmw_vsock_virtio_transport")

_SUFFIX: Final = re.compile(r"\.ko(\.(xz|zst|gz))?$")
_DEPENDS: Final = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")
_MAX_MODULE: Final = 64 << 20


@attrs.frozen
class Module:
    """A module: its name, with underscores as the kernel has it, and its object file, unpacked."""

    name: str
    data: bytes


def pick_modules(tree: Path, names: tuple[str, ...] = NEEDED) -> list[Module]:
    """Read ``names`` and their dependencies from ``tree`` (``lib/modules/RELEASE``).

    A module comes after its dependencies. Modules that ``modules.builtin`` lists are left out.

    :raises AssetNotFound: a module is neither there nor built in.
    """
    files = {_name(file): file for file in tree.rglob("*.ko*") if _SUFFIX.search(file.name)}
    builtin = _builtin(tree)
    picked: dict[str, Module] = {}

    def pick(name: str) -> None:
        if name in picked or name in builtin:
            return
        if name not in files:
            raise AssetNotFound(
                "kernel",
                f"{tree} has no module {name}",
                remedy="use a kernel package that is complete, or has it built in",
            )
        data = _read(files[name])
        for dependency in _depends(data):
            pick(dependency)
        picked[name] = Module(name, data)

    for name in names:
        pick(name)
    return list(picked.values())


def _name(file: Path) -> str:
    return _SUFFIX.sub("", file.name).replace("-", "_")


def _builtin(tree: Path) -> set[str]:
    try:
        lines = (tree / "modules.builtin").read_text().splitlines()
    except FileNotFoundError:
        return set()
    return {_name(Path(line)) for line in lines}


def _depends(data: bytes) -> list[str]:
    # There is no modules.dep: depmod makes it when a package is installed. The objects name their
    # dependencies themselves.
    match = _DEPENDS.search(data)
    return (
        [name.replace("-", "_") for name in match[1].decode().split(",") if name] if match else []
    )


def _read(file: Path) -> bytes:
    data = file.read_bytes()
    if file.suffix == ".xz":
        return lzma.LZMADecompressor().decompress(data, _MAX_MODULE)
    if file.suffix == ".zst":
        import zstandard  # modules are read when a kernel is prepared, which a start seldom does

        return zstandard.ZstdDecompressor().decompress(data, max_output_size=_MAX_MODULE)
    if file.suffix == ".gz":
        return gzip.decompress(data)
    return data
