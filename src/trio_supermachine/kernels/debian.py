"""Debian packages, which the host's own ``apt-get`` downloads. They are unpacked, not installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs

from .._util.process import run_process
from .._util.progress import ProgressCallback, report
from ..errors import AssetNotFound
from ..host.files import offline

REMEDY: Final = (
    "run `apt-get update` and try again, or give a kernel by TRIO_SUPERMACHINE_KERNEL=PATH"
)

_BY_HAND: Final = "set TRIO_SUPERMACHINE_KERNEL to an x86-64 Linux kernel"


@attrs.frozen
class Package:
    """A package that apt can download.

    :ivar size: its size in bytes; ``None`` if apt does not tell.
    """

    name: str
    version: str
    size: int | None


def check_apt() -> None:
    """Check that packages can be downloaded here.

    :raises AssetNotFound: nothing may be downloaded, or this host has no apt.
    """
    if offline():
        raise AssetNotFound(
            "kernel",
            "there is none yet, and TRIO_SUPERMACHINE_OFFLINE forbids to fetch one",
            remedy="unset TRIO_SUPERMACHINE_OFFLINE once, or set TRIO_SUPERMACHINE_KERNEL=PATH",
        )
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise AssetNotFound(
                "kernel",
                f"there is none yet, and this host has no {tool} to fetch Debian's",
                remedy=_BY_HAND,
            )


async def package_names(prefix: str) -> list[str]:
    """List the packages whose names begin with ``prefix``.

    Some may be known only because other packages refer to them.
    """
    return (await _run(["apt-cache", "pkgnames", prefix])).split()


async def dependencies(package: str) -> str:
    """Give the dependencies of ``package``, as ``apt-cache depends`` prints them."""
    return await _run(["apt-cache", "depends", package])


async def first_available(names: Sequence[str]) -> Package | None:
    """Find the first of ``names`` that apt can download."""
    for name in names:
        shown = await _run(["apt-cache", "show", "--no-all-versions", name])
        if f"Package: {name}\n" in shown:
            version = re.search(r"^Version: (\S+)$", shown, re.MULTILINE)
            size = re.search(r"^Size: (\d+)$", shown, re.MULTILINE)
            return Package(name, version[1] if version else "", int(size[1]) if size else None)
    return None


async def download(
    package: Package, directory: Path, progress: ProgressCallback | None = None
) -> Path:
    """Download ``package`` into ``directory``, unpack it there and give the unpacked tree.

    Cancellation ends apt.

    :param progress: is told the download; if it is ``None``, a line on stderr tells it.
    :raises AssetNotFound: the package cannot be downloaded.
    """
    if progress is None:
        print(f"trio-supermachine: downloading {package.name} ({_mb(package)})", file=sys.stderr)
    await report(progress, "download", package.name, 0, package.size)
    await _download(package.name, directory)
    await report(progress, "download", package.name, package.size or 0, package.size)
    (archive,) = [name for name in os.listdir(directory) if name.endswith(".deb")]
    await _run(["dpkg-deb", "-x", archive, "tree"], directory, check=True)
    os.unlink(directory / archive)
    return directory / "tree"


async def _download(package: str, directory: Path) -> None:
    command = ["apt-get", "-qq", "download"]
    if os.geteuid() == 0:
        # apt would complain that the user _apt, as whom it downloads, cannot write here.
        command += ["-o", "APT::Sandbox::User=root"]
    try:
        await _run([*command, package], directory, check=True)
    except subprocess.CalledProcessError as exc:
        said = exc.stderr.decode("utf-8", "replace").strip()
        raise AssetNotFound(
            "kernel", f"downloading {package} failed: {said[-500:]}", remedy=REMEDY
        ) from None


async def _run(command: Sequence[str], cwd: Path = Path("/"), *, check: bool = False) -> str:
    done = await run_process(
        command,
        cwd=cwd,
        stdin=b"",
        capture_stdout=True,
        capture_stderr=True,
        check=check,
        env={**os.environ, "LC_ALL": "C"},
    )
    return done.stdout.decode("utf-8", "replace")


def _mb(package: Package) -> str:
    return "size unknown" if package.size is None else f"{package.size / 1e6:.0f} MB"
