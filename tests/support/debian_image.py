"""Debian images as other tools make them. That takes a minute or two, so they are kept."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import trio

from trio_supermachine.host import files as hostfiles
from trio_supermachine.host.locks import locked

run = partial(trio.run_process, capture_stdout=True, capture_stderr=True)


@pytest.fixture(scope="session")
def debian_layout() -> Path:
    """An OCI layout with the tag ``t``: Debian with Python and its test suite."""
    return trio.run(_with_test_suite)


async def _with_test_suite() -> Path:
    found = await run(["apt-cache", "search", "--names-only", r"^libpython3\.[0-9]*-testsuite$"])
    return await kept_layout(
        ["python3", "libpython3-stdlib", found.stdout.decode().split()[0]], options=[]
    )


async def kept_layout(packages: Sequence[str], options: Sequence[str]) -> Path:
    """An OCI layout with the tag ``t``: the host's Debian with these packages, made by mmdebstrap
    (with these options of its) and umoci, or by an earlier run.
    """
    codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    command = ["mmdebstrap", "--variant=apt", *options, "--include=" + ",".join(packages), codename]
    digest = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
    kept = hostfiles.home() / "test-images"
    layout = kept / f"{codename}-{digest}"
    async with locked(kept / ".lock"):
        if not layout.exists():
            hostfiles.sweep(kept)
            with hostfiles.new_directory(layout) as directory:
                await _make(directory, command)
    return layout


async def _make(layout: Path, command: list[str]) -> None:
    archive, unpacked, image = layout / "root.tar", layout / "root", f"{layout}/image:t"
    await run([*command, str(archive)])
    await run(["umoci", "init", "--layout", f"{layout}/image"])
    await run(["umoci", "new", "--image", image])
    unpacked.mkdir()
    await run(["tar", "-C", str(unpacked), "-xf", str(archive), "--exclude=./dev/*"])
    await run(["umoci", "insert", "--image", image, str(unpacked), "/"])
    await run(["rm", "-r", str(unpacked), str(archive)])
    for made in (layout / "image").iterdir():
        made.rename(layout / made.name)
    (layout / "image").rmdir()
