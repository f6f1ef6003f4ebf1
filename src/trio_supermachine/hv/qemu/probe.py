"""Facts about this host's QEMU and clock, found once and remembered by the program's identity."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Final

import trio

from ..._util.process import run_process
from ...errors import EngineUnavailable
from ..base import EngineReport
from .firmware import FIRMWARE

#: The oldest version that is known to take this engine's command line (JSON for ``-device``).
MINIMUM: Final = (6, 2)
_TIMEOUT: Final = 20.0  # seconds; a cold start from a slow disk takes one or two
_REMEDY: Final = "apt-get install qemu-system-x86"
_FIRMWARE_REMEDY: Final = f"apt-get install qemu-system-data, or QEMU's {FIRMWARE} by other means"

_Identity = tuple[str, int, int, int, int]
_versions: dict[_Identity, tuple[int, int]] = {}
_reports: dict[_Identity, EngineReport] = {}
_frequencies: dict[_Identity, int] = {}


async def probe_binary(qemu: Path) -> EngineReport:
    """Find out whether ``qemu`` is a QEMU that can run machines of this engine."""
    identity = _identity(qemu)
    if identity not in _reports:
        remedy, detail = await _examine(qemu)
        _reports[identity] = EngineReport(
            name="qemu", available=remedy is None, detail=detail, remedy=remedy
        )
    await trio.lowlevel.checkpoint()
    return _reports[identity]


async def version(qemu: Path) -> str:
    """Give the version of ``qemu`` without the patch level, over which saved states stay readable.

    :raises EngineUnavailable: it does not run.
    """
    found = await _version(qemu)
    if found is None:
        raise EngineUnavailable({"qemu": f"{qemu} does not run, or is not QEMU"})
    return f"{found[0]}.{found[1]}"


@cache
def host_cpu() -> str:
    """Give the name of this host's processor."""
    with open("/proc/cpuinfo", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


async def tsc_khz(launcher: Path) -> int:
    """Measure the frequency of this host's TSC in kHz: once, in 20 ms.

    :raises EngineUnavailable: it cannot be measured.
    """
    identity = _identity(launcher)
    if identity not in _frequencies:
        said = await _output([launcher, "tsc-khz"])
        if said is None or not said.strip().isdigit():
            raise EngineUnavailable({"qemu": f"{launcher} cannot measure this host's TSC"})
        _frequencies[identity] = int(said)
    await trio.lowlevel.checkpoint()
    return _frequencies[identity]


async def _examine(qemu: Path) -> tuple[str | None, str]:
    """Give the remedy, if ``qemu`` is not usable, and what was found."""
    version = await _version(qemu)
    if version is None:
        return _REMEDY, f"{qemu} does not run, or is not QEMU"
    name = f"QEMU {version[0]}.{version[1]} ({qemu})"
    if version < MINIMUM:
        return _REMEDY, f"{name} is older than {MINIMUM[0]}.{MINIMUM[1]}"
    machines = await _output([qemu, "-machine", "help"])
    if not re.search(r"^microvm\s", machines or "", re.MULTILINE):
        return _REMEDY, f"{name} has no machine 'microvm'"
    firmware = await _find_firmware(qemu)
    if firmware is None:
        return _FIRMWARE_REMEDY, f"{name} has no firmware {FIRMWARE}"
    return None, f"{name}, emulation (TCG), firmware {firmware}"


async def _find_firmware(qemu: Path) -> str | None:
    """Find the firmware among QEMU's files, which are usually beside the program."""
    if usual := _first(os.path.join(_prefix(qemu), "share/qemu")):
        return usual
    return _first(*(await _output([qemu, "-L", "help"]) or "").splitlines())


def _prefix(program: Path) -> str:
    return os.path.dirname(os.path.dirname(os.path.realpath(program)))


def _first(*directories: str) -> str | None:
    """Find the firmware in the first of these directories that has it."""
    found = (os.path.join(directory, FIRMWARE) for directory in directories)
    return next(filter(os.path.exists, found), None)


async def _version(qemu: Path) -> tuple[int, int] | None:
    identity = _identity(qemu)
    if identity not in _versions:
        said = await _output([qemu, "--version"])
        match = re.search(r"version (\d+)\.(\d+)", said or "")
        if match is None:
            return None
        _versions[identity] = int(match[1]), int(match[2])
    await trio.lowlevel.checkpoint()
    return _versions[identity]


async def _output(command: list[Path | str]) -> str | None:
    """Run ``command`` and give what it prints; ``None`` if it fails."""
    try:
        with trio.fail_after(_TIMEOUT):
            done = await run_process(
                command,
                capture_stdout=True,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
    except (OSError, subprocess.CalledProcessError, trio.TooSlowError):
        return None
    return done.stdout.decode("utf-8", "replace")


def _identity(program: Path) -> _Identity:
    status = os.stat(program)
    return str(program), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
