"""The small kernel: a build of Debian's ``linux-source`` package with this package's fragment."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from .._util.progress import ProgressCallback, report
from ..errors import AssetNotFound, NotSupported
from .debian import REMEDY, Package, check_apt, download, first_available, package_names
from .fragment import missing_options
from .group import CommandFailed, run_group
from .versions import version_key

#: The programs that a build runs, each with the package that has it.
_PROGRAMS: Final = {
    "gcc": "gcc",
    "ld": "binutils",
    "strip": "binutils",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "tar": "tar",
    "xz": "xz-utils",
    "nice": "coreutils",
}
_HEADERS: Final = {"stdio.h": "libc6-dev", "gelf.h": "libelf-dev"}

_SOURCE: Final = re.compile(r"linux-source-(6\.(?:1[2-9]|[2-9]\d)|[7-9]\.\d+)")
#: The room that sources and objects take, in MiB.
_SPACE_MIB: Final = 1200
# Files that are never compiled, more than half of all. To unpack and to remove these would take the
# most time. Kconfig files and Makefiles have to stay.
_NEVER_COMPILED: Final = (
    *("clk", "crypto", "gpu", "iio", "infiniband", "media", "net/ethernet", "net/wireless"),
    *("pinctrl", "scsi", "staging", "usb"),
)
_LEFT_OUT: Final = (
    *(f"arch/[a-w]*.{suffix}" for suffix in ("[chS]", "dts", "dtsi")),
    "Documentation/*/*",
    "tools/perf/*",
    "tools/testing/*",
    "sound/*.[ch]",
    *(f"drivers/{name}/*.[ch]" for name in _NEVER_COMPILED),
)
_NAME: Final = "trio-supermachine"
_STEP: Final = re.compile(r"  (CC|AS|LD|AR|HOSTCC|OBJCOPY) +(\S+)")
#: The number of such steps in a build, roughly.
_STEPS: Final = 1870


def check_tools() -> None:
    """Check that the kernel can be built on this host.

    :raises AssetNotFound: a build tool is missing; the message names the packages.
    :raises NotSupported: the host is not an x86-64 one.
    """
    if platform.machine() != "x86_64":
        raise NotSupported(
            "kernel build",
            f"the kernel can be built on x86-64 only, not on {platform.machine()};"
            " name one by TRIO_SUPERMACHINE_KERNEL=PATH",
        )
    lacking = {package for tool, package in _PROGRAMS.items() if shutil.which(tool) is None}
    if "gcc" not in lacking:
        lacking |= {package for header, package in _HEADERS.items() if not _has_header(header)}
    else:
        lacking |= set(_HEADERS.values())
    if lacking:
        names = " ".join(sorted(lacking))
        raise AssetNotFound(
            "kernel", f"building it needs {names}", remedy=f"apt-get install {names}"
        )


def _has_header(name: str) -> bool:
    done = subprocess.run(
        ["gcc", "-E", "-o", os.devnull, "-"],
        input=f"#include <{name}>\n".encode(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode == 0


async def choose_source() -> Package:
    """Choose the package to build from: the oldest that will do, for which the fragment is made.

    :raises AssetNotFound: apt knows no such package, or is not there.
    """
    check_apt()
    names = [name for name in await package_names("linux-source-") if _SOURCE.fullmatch(name)]
    package = await first_available(sorted(names, key=version_key))
    if package is None:
        raise AssetNotFound(
            "kernel", "apt knows no linux-source package of 6.12 or newer", remedy=REMEDY
        )
    return package


@asynccontextmanager
async def built_kernel(
    package: Package,
    fragment: str,
    scratch: Path,
    *,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> AsyncIterator[Path]:
    """Build ``package`` with ``fragment``, and give the kernel's ELF image, for the block.

    :param scratch: a directory for the sources and objects.
    :param jobs: the number of compilers to run at once; ``None`` is the number of processors.
    :raises AssetNotFound: the kernel cannot be built here; the message says what to do.
    """
    free = shutil.disk_usage(scratch).free >> 20
    if free < _SPACE_MIB:
        raise AssetNotFound(
            "kernel",
            f"building it takes {_SPACE_MIB} MiB, and {scratch} has {free} left",
            remedy="free some space, or set TRIO_SUPERMACHINE_HOME to another directory",
        )
    directory = Path(tempfile.mkdtemp(prefix=".tmp-", dir=scratch))
    try:
        make = ["nice", "make", "ARCH=x86_64"]
        try:
            tree = await _unpacked(package, directory, progress)
            env = _environment(tree)
            await _configure(make, tree, fragment, env, package)
            count = jobs or len(os.sched_getaffinity(0))
            await _compile([*make, f"-j{count}", "vmlinux"], tree, env, package, progress)
            await run_group(["strip", "vmlinux"], tree, env)
        except CommandFailed as exc:
            raise AssetNotFound(
                "kernel",
                f"building {package.name} {package.version} failed: {exc.said[-1500:]}",
                remedy="see what the compiler says, or use the stock kernel",
            ) from None
        yield tree / "vmlinux"
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(shutil.rmtree, directory, True)


async def _unpacked(package: Package, directory: Path, progress: ProgressCallback | None) -> Path:
    unpacked = await download(package, directory, progress)
    await report(progress, "unpack", package.name, 0, None)
    archives = list((unpacked / "usr/src").glob("linux-source-*.tar.xz"))
    if len(archives) != 1:
        raise AssetNotFound(
            "kernel",
            f"the package {package.name} holds {len(archives)} archives of sources",
            remedy="use the stock kernel, or set TRIO_SUPERMACHINE_KERNEL=PATH",
        )
    tree = directory / "source"
    tree.mkdir()
    top = archives[0].name.removesuffix(".tar.xz")
    skip = [f"--exclude={top}/{pattern}" for pattern in _LEFT_OUT]
    command = ["tar", "--anchored", *skip, "--strip-components=1", "-xJf", str(archives[0])]
    await run_group(command, tree, os.environ)
    return tree


def _environment(tree: Path) -> dict[str, str]:
    """Make an environment in which the same sources always make the same kernel.

    Of the caller's environment it has the path to the tools alone.
    """
    made = time.gmtime((tree / "Makefile").stat().st_mtime)
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C",
        "TMPDIR": str(tree.parent),  # which is removed, with what a killed compiler leaves
        "KBUILD_BUILD_USER": _NAME,
        "KBUILD_BUILD_HOST": _NAME,
        "KBUILD_BUILD_TIMESTAMP": time.strftime("%Y-%m-%d %H:%M:%S UTC", made),
    }


async def _configure(
    make: list[str], tree: Path, fragment: str, env: Mapping[str, str], package: Package
) -> None:
    wanted = tree.parent / "fragment"
    wanted.write_text(fragment)
    await run_group([*make, "allnoconfig"], tree, {**env, "KCONFIG_ALLCONFIG": str(wanted)})
    missing = missing_options(fragment, (tree / ".config").read_text())
    if missing:
        raise AssetNotFound(
            "kernel",
            f"{package.name} {package.version} does not take {', '.join(missing)}",
            remedy="use the stock kernel, and report this",
        )


async def _compile(
    command: list[str],
    tree: Path,
    env: Mapping[str, str],
    package: Package,
    progress: ProgressCallback | None,
) -> None:
    done = 0

    async def step(line: str) -> None:
        nonlocal done
        if match := _STEP.match(line):
            done = min(done + 1, _STEPS)
            await report(progress, "build", match[2], done, _STEPS)

    await report(progress, "build", package.name, 0, _STEPS)
    await run_group(command, tree, env, step)
    await report(progress, "build", package.name, _STEPS, _STEPS)
