"""Files and programs that a machine needs, and where they are looked for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import attrs

from .._public import public
from ..errors import AssetNotFound


def _absolute(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path).absolute()


@public
@attrs.frozen(kw_only=True)
class AssetPaths:
    """Explicit places of the files that a machine needs.

    For a field that is ``None`` an environment variable counts, and without one the usual place.
    """

    #: A Linux kernel, bzImage or ELF (``TRIO_SUPERMACHINE_KERNEL``; usually one that
    #: ``trio-supermachine kernel`` has prepared).
    kernel: Path | None = attrs.field(default=None, converter=_absolute)
    #: The initramfs to boot with that kernel, complete with this package's init; ``None`` makes
    #: one (no variable).
    initramfs: Path | None = attrs.field(default=None, converter=_absolute)
    #: The program ``qemu-system-x86_64`` (``TRIO_SUPERMACHINE_QEMU``; usually from ``PATH``).
    qemu: Path | None = attrs.field(default=None, converter=_absolute)


def find_qemu(assets: AssetPaths | None = None) -> Path:
    """Give the absolute path of QEMU.

    :raises AssetNotFound: there is none.
    """
    name = "qemu-system-x86_64"
    explicit = _explicit(
        "qemu", assets, "TRIO_SUPERMACHINE_QEMU", "apt-get install qemu-system-x86"
    )
    if explicit is not None:
        return explicit
    found = shutil.which(name)
    if found is None:
        raise AssetNotFound(
            "qemu",
            f"no {name} in PATH",
            remedy="apt-get install qemu-system-x86 (or set TRIO_SUPERMACHINE_QEMU)",
        )
    return Path(found).absolute()


def find_kernel(assets: AssetPaths | None = None) -> Path | None:
    """Give the kernel that ``assets`` or the environment names; ``None`` if neither does.

    :raises AssetNotFound: it does not exist.
    """
    return _explicit(
        "kernel",
        assets,
        "TRIO_SUPERMACHINE_KERNEL",
        "leave it out, and a stock kernel is fetched",
    )


def find_initramfs(assets: AssetPaths | None = None) -> Path | None:
    """Give the initramfs that ``assets`` names; ``None`` if it names none.

    :raises AssetNotFound: it does not exist.
    """
    return _explicit("initramfs", assets, None, "leave it out, and one is made")


def _explicit(
    asset: str, assets: AssetPaths | None, variable: str | None, remedy: str
) -> Path | None:
    path: Path | None = getattr(assets, asset) if assets is not None else None
    origin = f"AssetPaths.{asset}"
    if path is None and variable is not None and (value := os.environ.get(variable)):
        path, origin = Path(value).absolute(), variable
    if path is not None and not path.is_file():
        raise AssetNotFound(asset, f"{origin} is {path}, which is not a file", remedy=remedy)
    return path
