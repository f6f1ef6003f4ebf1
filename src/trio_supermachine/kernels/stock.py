"""Debian's cloud kernel, by the host's own ``apt-get``: downloaded and unpacked, not installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from ..errors import AssetNotFound
from ..hostfiles import offline
from ..oci.progress import ProgressCallback, report

_META: Final = "linux-image-cloud-amd64"
_PREFIX: Final = "linux-image-6."
#: Kernels from 6.12 on are preferred: the agent's networking is made for them.
_PREFERRED: Final = re.compile(r"linux-image-(6\.(?:1[2-9]|[2-9]\d)\.\S+)-cloud-amd64(-unsigned)?")
_ASKED: Final = 6  # candidates to ask apt about; the newest is nearly always there

_REMEDY: Final = (
    "run `apt-get update` and try again, or give a kernel by TRIO_SUPERMACHINE_KERNEL=PATH"
)


@asynccontextmanager
async def stock_kernel(
    scratch: Path, progress: ProgressCallback | None = None
) -> AsyncIterator[tuple[str, Path]]:
    """Fetch the stock kernel: gives its package's name and the unpacked tree, for the block.

    :param scratch: a directory for temporary files.
    :raises AssetNotFound: it cannot be had here; the message says what to do.
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
                remedy="set TRIO_SUPERMACHINE_KERNEL to an x86-64 Linux kernel",
            )
    package, size = await _choose()
    if progress is None:
        print(f"trio-supermachine: downloading {package} ({_mb(size)})", file=sys.stderr)
    await report(progress, "download", package, 0, size)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=scratch) as name:
        directory = Path(name)
        await _download(package, directory)
        await report(progress, "download", package, size or 0, size)
        yield package, await _unpack(directory)


def newest_first(packages: Sequence[str]) -> list[str]:
    """The preferred packages among ``packages``, the newest first; signed before unsigned."""
    found = [match for package in packages if (match := _PREFERRED.fullmatch(package))]
    found.sort(key=lambda match: (version_key(match[1]), match[2] is None), reverse=True)
    return [match[0] for match in found]


def version_key(version: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts kernel releases as people would."""
    parts = re.findall(r"\d+|[^\d]+", version)
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts)


async def _choose() -> tuple[str, int | None]:
    names = (await _run(["apt-cache", "pkgnames", _PREFIX])).split()
    wanted = newest_first(names)[:_ASKED]
    match = re.search(
        r"Depends: (linux-image-\S+-cloud-amd64)", await _run(["apt-cache", "depends", _META])
    )
    if match:
        wanted.append(match[1])
    for package in wanted:
        # A name alone may be there because others refer to it.
        shown = await _run(["apt-cache", "show", "--no-all-versions", package])
        if f"Package: {package}\n" in shown:
            size = re.search(r"^Size: (\d+)$", shown, re.MULTILINE)
            return package, int(size[1]) if size else None
    raise AssetNotFound(
        "kernel", "there is none yet, and apt knows no cloud kernel", remedy=_REMEDY
    )


async def _download(package: str, directory: Path) -> None:
    command = ["apt-get", "-qq", "download"]
    if os.geteuid() == 0:
        # apt would give up root for the user _apt, who cannot write here, and complain.
        command += ["-o", "APT::Sandbox::User=root"]
    try:
        await _run([*command, package], directory, check=True)
    except subprocess.CalledProcessError as exc:
        said = exc.stderr.decode("utf-8", "replace").strip()
        raise AssetNotFound(
            "kernel", f"downloading {package} failed: {said[-500:]}", remedy=_REMEDY
        ) from None


async def _unpack(directory: Path) -> Path:
    (archive,) = [name for name in os.listdir(directory) if name.endswith(".deb")]
    await _run(["dpkg-deb", "-x", archive, "tree"], directory, check=True)
    return directory / "tree"


async def _run(command: Sequence[str], cwd: Path = Path("/"), *, check: bool = False) -> str:
    done = await trio.run_process(
        command,
        cwd=cwd,
        stdin=b"",
        capture_stdout=True,
        capture_stderr=True,
        check=check,
        env={**os.environ, "LC_ALL": "C"},
    )
    return done.stdout.decode("utf-8", "replace")


def _mb(size: int | None) -> str:
    return "size unknown" if size is None else f"{size / 1e6:.0f} MB"
