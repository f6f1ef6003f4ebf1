"""The choice of the engine that runs a guest on this host."""

from __future__ import annotations

import os
import sys
from typing import Final

import trio

from ..errors import ConfigError, EngineUnavailable
from ..host.assets import AssetPaths
from ..host.files import home
from . import probed
from .base import Engine, EngineReport
from .qemu.engine import QemuEngine

#: The names that a caller may give; ``"auto"`` tries the others in this order.
ENGINES: Final = ("auto", "kvm", "qemu")
#: The environment variable with the name that ``"auto"`` stands for.
VARIABLE: Final = "TRIO_SUPERMACHINE_ENGINE"

_KVM: Final = f"{__package__}.kvm.engine"
_NOT_BUILT: Final = (
    "on x86-64, apt-get install python3-dev, then install this package again from its source"
)

#: Results of the KVM probe by the identity of the device.
_remembered: dict[tuple[int, ...] | None, EngineReport] = {}
_lock: Final = trio.lowlevel.RunVar[trio.Lock]("_lock")


async def choose_engine(name: str = "auto", assets: AssetPaths | None = None) -> Engine:
    """Give the engine called ``name``, or with ``"auto"`` the best one that can run a guest here.

    ``"auto"`` is the engine that ``$TRIO_SUPERMACHINE_ENGINE`` names, if it is set. Else it is
    KVM where that runs Linux at the speed of the hardware, and QEMU elsewhere. Cheap when
    repeated, and in later programs: a result is remembered as long as it holds.

    :raises EngineUnavailable: this engine, or each engine, cannot; ``tried`` says why.
    :raises ConfigError: there is no engine of that name.
    """
    if name not in ENGINES:
        raise ConfigError(f"no engine {name!r}; there are {', '.join(ENGINES)}")
    way_out = "leave the engine out"
    if name == "auto":
        name, way_out = default_engine(), f"unset {VARIABLE}"
    tried = {}
    for candidate in ENGINES[1:] if name == "auto" else (name,):
        engine, report = await _examine(candidate, assets)
        if engine is not None and report.available:
            return engine
        remedy = f"; to get it: {report.remedy}" if report.remedy else ""
        tried[candidate] = report.detail + remedy
    other = f"{way_out} to use qemu; a snapshot that was made on kvm needs kvm"
    raise EngineUnavailable(tried, remedy=other if name == "kvm" else "")


async def probe_engines() -> list[EngineReport]:
    """Probe each engine, the preferred one first. For people: ``doctor`` prints it.

    Results of other programs do not count.
    """
    return [(await _examine(name, None, anew=True))[1] for name in ENGINES[1:]]


def default_engine() -> str:
    """Give the name that ``"auto"`` stands for in this environment; it may be ``"auto"`` itself.

    :raises ConfigError: the environment names an engine that there is not.
    """
    name = os.environ.get(VARIABLE) or "auto"
    if name not in ENGINES:
        raise ConfigError(f"{VARIABLE}={name}: no such engine; there are {', '.join(ENGINES)}")
    return name


async def _examine(
    name: str, assets: AssetPaths | None, *, anew: bool = False
) -> tuple[Engine, EngineReport] | tuple[None, EngineReport]:
    if name == "qemu":
        engine: Engine = QemuEngine(assets)
        return engine, await engine.probe()
    if sys.platform != "linux":
        return None, _no_kvm("KVM is a part of Linux")
    async with _probing():
        device = probed.device_identity()
        report = _remembered.get(device)
        if report is None:
            report = _remembered[device] = await _probe_kvm(device, anew=anew)
    if not report.available:
        return None, report
    try:
        if _KVM in sys.modules:
            return _load_kvm(), report
        # In a thread: the import takes too long for a loop that serves other VMs.
        return await trio.to_thread.run_sync(_load_kvm), report
    except ImportError as exc:
        return None, _no_kvm(f"its extension is not built ({exc})", _NOT_BUILT)


async def _probe_kvm(device: tuple[int, ...] | None, *, anew: bool) -> EngineReport:
    """Probe the device, unless a program did so before and its answer holds.

    :param device: the device's identity; ``None`` if there is none.
    :param anew: probe it in any case.
    """
    if device is not None and not anew:
        kept = await trio.to_thread.run_sync(probed.recall, device)
        if kept is not None:
            return kept
    from .kvm.probe import probe_kvm  # seldom: the answer holds for the rest of the boot

    found = await probe_kvm()
    report = EngineReport(
        name="kvm", available=found.usable, detail=found.detail, remedy=found.remedy
    )
    # What kept it from being measured may pass, or change with the package. A look at the host
    # makes no data directory.
    measured = found.hardware_speed is not None
    if device is not None and measured and (not anew or home().exists()):
        await trio.to_thread.run_sync(probed.remember, device, report)
    return report


def _load_kvm() -> Engine:
    # Only where it can run: the devices and the extension are a quarter of the package. The
    # extension is made for Linux only, and not at all where Python's headers are missing.
    from .kvm.engine import KvmEngine

    return KvmEngine()


def _probing() -> trio.Lock:
    """Give this run's lock for probes: several at once would slow each other."""
    try:
        return _lock.get()
    except LookupError:
        _lock.set(lock := trio.Lock())
        return lock


def _no_kvm(detail: str, remedy: str | None = None) -> EngineReport:
    return EngineReport(name="kvm", available=False, detail=detail, remedy=remedy)
