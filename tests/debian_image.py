"""A Debian with Python as other tools make one. It takes a minute, so it is kept for later runs."""

from __future__ import annotations

import hashlib
import platform
from functools import partial
from pathlib import Path

import pytest
import trio

from trio_supermachine import hostfiles

run = partial(trio.run_process, capture_stdout=True, capture_stderr=True)


@pytest.fixture(scope="session")
def debian_layout() -> Path:
    """An OCI layout with the tag ``t``: Debian with Python and its test suite, made by mmdebstrap
    and umoci.
    """
    return trio.run(_prepare)


async def _prepare() -> Path:
    codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    found = await run(["apt-cache", "search", "--names-only", r"^libpython3\.[0-9]*-testsuite$"])
    packages = "python3,libpython3-stdlib," + found.stdout.decode().split()[0]
    digest = hashlib.sha256(packages.encode()).hexdigest()[:12]
    kept = hostfiles.home() / "test-images"
    layout = kept / f"{codename}-{digest}"
    async with hostfiles.locked(kept / ".lock"):
        if not layout.exists():
            hostfiles.sweep(kept)
            with hostfiles.new_directory(layout) as directory:
                await _make(directory, codename, packages)
    return layout


async def _make(layout: Path, codename: str, packages: str) -> None:
    archive, unpacked, image = layout / "root.tar", layout / "root", f"{layout}/image:t"
    await run(["mmdebstrap", "--variant=apt", f"--include={packages}", codename, str(archive)])
    await run(["umoci", "init", "--layout", f"{layout}/image"])
    await run(["umoci", "new", "--image", image])
    unpacked.mkdir()
    await run(["tar", "-C", str(unpacked), "-xf", str(archive), "--exclude=./dev/*"])
    await run(["umoci", "insert", "--image", image, str(unpacked), "/"])
    await run(["rm", "-r", str(unpacked), str(archive)])
    for made in (layout / "image").iterdir():
        made.rename(layout / made.name)
    (layout / "image").rmdir()
