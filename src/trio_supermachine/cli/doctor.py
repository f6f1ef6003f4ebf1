"""``trio-supermachine doctor``: can this host start VMs, and if not, what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import attrs
import click

from .._version import __version__
from ..config.defaults import DEFAULT_MEMORY_MIB
from ..errors import AssetNotFound, ConfigError
from ..guest import init_binary, launcher_binary
from ..host.assets import find_kernel
from ..host.files import home, offline
from ..hv.base import EngineReport
from ..hv.select import VARIABLE, default_engine, probe_engines
from ..kernels import preferred_kernel
from .interrupts import run_until_signal

#: What QEMU itself takes beside the guest's memory, roughly.
_OVERHEAD_MIB: Final = 64
#: Room for a kernel, its modules and a few images.
_DISK_MIB: Final = 512

State = Literal["ok", "warning", "missing"]


@attrs.frozen
class Check:
    """One thing looked at. Only ``"missing"`` keeps VMs from starting."""

    name: str
    state: State
    detail: str
    remedy: str | None = None


@attrs.frozen
class Diagnosis:
    """Findings about this host; ``wanted`` is the engine that the environment names."""

    checks: tuple[Check, ...]
    engines: tuple[EngineReport, ...]
    wanted: str = "auto"

    @property
    def engine(self) -> str | None:
        """The engine that VMs start on, unless a program names another."""
        usable = (
            report.name
            for report in self.engines
            if report.available and self.wanted in ("auto", report.name)
        )
        return next(usable, None)

    @property
    def ok(self) -> bool:
        """Whether a VM can be started here."""
        return self.engine is not None and all(check.state != "missing" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Give the diagnosis as one JSON object."""
        return {
            "ok": self.ok,
            "version": __version__,
            "engine": self.engine,
            "engines": [attrs.asdict(report) for report in self.engines],
            "checks": [attrs.asdict(check) for check in self.checks],
        }

    def lines(self) -> Iterator[str]:
        """Give the diagnosis as lines for people."""
        for check in self.checks:
            yield from _lines(check.state, check.name, check.detail, check.remedy)
        for report in self.engines:
            state = "ok" if report.available else "no"
            yield from _lines(state, f"engine {report.name}", report.detail, report.remedy)
        yield ""
        if self.ok:
            because = "" if self.wanted == "auto" else f" ({VARIABLE} says so)"
            yield f"VMs start here, on the engine {self.engine}{because}."
        else:
            yield "No VM can be started here; see above for what is missing."


def _lines(state: str, name: str, detail: str, remedy: str | None) -> Iterator[str]:
    yield f"{state:<8} {name:<16} {detail}"
    if remedy is not None:
        yield f"{'':<8} {'':<16} -> {remedy}"


def tell(*, as_json: bool) -> int:
    """Print the diagnosis; give the program's exit code."""
    diagnosis = run_until_signal(examine)
    if as_json:
        click.echo(json.dumps(diagnosis.as_json(), indent=2))
    else:
        for line in diagnosis.lines():
            click.echo(line)
    return 0 if diagnosis.ok else 1


async def examine() -> Diagnosis:
    """Look at everything that a VM needs; changes nothing on this host."""
    wanted, unknown = _wanted_engine()
    checks = (
        Check("trio-supermachine", "ok", __version__),
        _python(),
        Check("trio", "ok", importlib.metadata.version("trio")),
        _guest_programs(),
        await _kernel(),
        _tool("squashfs-tools", "sqfstar", "images other than cached ones cannot be converted"),
        _tool("e2fsprogs", "mke2fs", "volumes cannot be made"),
        _memory(),
        Check("cores", "ok", str(len(os.sched_getaffinity(0)))),
        _data_directory(),
        *unknown,
    )
    return Diagnosis(checks, tuple(await probe_engines()), wanted)


def _wanted_engine() -> tuple[str, tuple[Check, ...]]:
    try:
        return default_engine(), ()
    except ConfigError as exc:
        return "auto", (Check("engine", "missing", str(exc), f"unset {VARIABLE}"),)


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.machine()}")


def _guest_programs() -> Check:
    finders: tuple[Callable[[], Path], ...] = (init_binary, launcher_binary)
    try:
        found = [finder() for finder in finders]
    except AssetNotFound as exc:
        return Check("guest programs", "missing", exc.reason, exc.remedy)
    return Check("guest programs", "ok", ", ".join(map(str, found)))


async def _kernel() -> Check:
    try:
        explicit = find_kernel()
    except AssetNotFound as exc:
        return Check("kernel", "missing", exc.reason, exc.remedy)
    if explicit is not None:
        return Check("kernel", "ok", f"{explicit} (TRIO_SUPERMACHINE_KERNEL)")
    kernel = await preferred_kernel()
    if kernel is not None:
        hint = "; `trio-supermachine kernel build` makes a faster one" if kernel.stock else ""
        return Check("kernel", "ok", f"{kernel.release} in {kernel.directory}{hint}")
    by_hand = "set TRIO_SUPERMACHINE_KERNEL to an x86-64 Linux kernel"
    if offline():
        return Check(
            "kernel",
            "missing",
            "there is none yet, and TRIO_SUPERMACHINE_OFFLINE forbids to fetch one",
            f"unset TRIO_SUPERMACHINE_OFFLINE once, or {by_hand}",
        )
    lacking = [t for t in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(t) is None]
    if lacking:
        detail = f"there is none yet, and this host has no {lacking[0]} to fetch Debian's"
        return Check("kernel", "missing", detail, by_hand)
    return Check("kernel", "ok", "none yet; the first start fetches Debian's cloud kernel")


def _tool(package: str, program: str, without: str) -> Check:
    # Administrators' programs are not in everyone's PATH on Debian.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(program, path=path)
    if found is None:
        return Check(package, "warning", f"no {program}: {without}", f"apt-get install {package}")
    return Check(package, "ok", found)


def _memory() -> Check:
    available = _available_memory_mib()
    if available is None:
        return Check("memory", "warning", "this host does not tell how much is available")
    detail = f"{available} MiB available"
    if available < DEFAULT_MEMORY_MIB + _OVERHEAD_MIB:
        return Check("memory", "warning", f"{detail}; a VM takes {DEFAULT_MEMORY_MIB} by default")
    return Check("memory", "ok", detail)


def _available_memory_mib() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return None


def _data_directory() -> Check:
    directory = home()
    existing = directory
    while not existing.exists():
        existing = existing.parent
    remedy = "set TRIO_SUPERMACHINE_HOME to a directory that can be written"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check("data directory", "missing", f"{directory} cannot be written", remedy)
    free = shutil.disk_usage(existing).free >> 20
    detail = f"{directory}, {free} MiB free"
    return Check("data directory", "ok" if free >= _DISK_MIB else "warning", detail)
