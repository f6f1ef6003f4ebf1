"""The choice of the engine that runs a guest on this host."""

from __future__ import annotations

import os
import sys
from typing import Final

import trio

from ..errors import ConfigError, EngineUnavailable
from ..host.assets import AssetPaths
from .base import Engine, EngineReport
from .qemu.engine import QemuEngine

#: The names that a caller may give; ``"auto"`` tries the others in this order.
ENGINES: Final = ("auto", "kvm", "qemu")
#: The environment variable with the name that ``"auto"`` stands for.
VARIABLE: Final = "TRIO_SUPERMACHINE_ENGINE"

_DEVICE: Final = "/dev/kvm"
_NOT_BUILT: Final = (
    "on x86-64, apt-get install python3-dev, then install this package again from its source"
)

#: Results of the KVM probe by the identity of the device. A probe takes up to a quarter second.
_remembered: dict[tuple[int, ...], EngineReport] = {}
_lock: Final = trio.lowlevel.RunVar[trio.Lock]("_lock")


async def choose_engine(name: str = "auto", assets: AssetPaths | None = None) -> Engine:
    """Give the engine called ``name``, or with ``"auto"`` the best one that can run a guest here.

    ``"auto"`` is the engine that ``$TRIO_SUPERMACHINE_ENGINE`` names, if it is set. Else it is
    KVM where that runs Linux at the speed of the hardware, and QEMU elsewhere. Cheap when
    repeated: results are remembered as long as the device and the program stay the same.

    :raises EngineUnavailable: this engine, or each engine, cannot; ``tried`` says why.
    :raises ConfigError: there is no engine of that name.
    """
    if name not in ENGINES:
        raise ConfigError(f"no engine {name!r}; there are {', '.join(ENGINES)}")
    if name == "auto":
        name = default_engine()
    tried = {}
    for candidate in ENGINES[1:] if name == "auto" else (name,):
        engine, report = await _examine(candidate, assets)
        if engine is not None and report.available:
            return engine
        remedy = f"; to get it: {report.remedy}" if report.remedy else ""
        tried[candidate] = report.detail + remedy
    raise EngineUnavailable(tried)


async def probe_engines() -> list[EngineReport]:
    """Probe each engine, the preferred one first. For people: ``doctor`` prints it."""
    return [(await _examine(name, None))[1] for name in ENGINES[1:]]


def default_engine() -> str:
    """Give the name that ``"auto"`` stands for in this environment; it may be ``"auto"`` itself.

    :raises ConfigError: the environment names an engine that there is not.
    """
    name = os.environ.get(VARIABLE) or "auto"
    if name not in ENGINES:
        raise ConfigError(f"{VARIABLE}={name}: no such engine; there are {', '.join(ENGINES)}")
    return name


async def _examine(
    name: str, assets: AssetPaths | None
) -> tuple[Engine, EngineReport] | tuple[None, EngineReport]:
    if name == "qemu":
        engine: Engine = QemuEngine(assets)
        return engine, await engine.probe()
    if sys.platform != "linux":
        return None, _no_kvm("KVM is a part of Linux")
    try:
        # The extension is built for Linux only, and not where Python's headers are missing.
        from .kvm.engine import KvmEngine
    except ImportError as exc:
        return None, _no_kvm(f"its extension is not built ({exc})", _NOT_BUILT)
    engine = KvmEngine()
    async with _probing():
        device = _identity()
        report = _remembered.get(device)
        if report is None:
            report = _remembered[device] = await engine.probe()
    return engine, report


def _probing() -> trio.Lock:
    """Give this run's lock for probes: several at once would slow each other."""
    try:
        return _lock.get()
    except LookupError:
        _lock.set(lock := trio.Lock())
        return lock


def _no_kvm(detail: str, remedy: str | None = None) -> EngineReport:
    return EngineReport(name="kvm", available=False, detail=detail, remedy=remedy)


def _identity() -> tuple[int, ...]:
    """Identify the device and this user's rights: while both stay, a probe's result holds."""
    groups = (os.geteuid(), *os.getgroups())
    try:
        found = os.stat(_DEVICE)
    except OSError:
        return groups
    # A kernel module that is loaded again makes a new device, with another time of change.
    return (found.st_ino, found.st_ctime_ns, found.st_mode, found.st_uid, found.st_gid, *groups)
