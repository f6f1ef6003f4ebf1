"""Which engine runs a guest on this host."""

from __future__ import annotations

from ..assets import AssetPaths
from ..errors import ConfigError, EngineUnavailable
from .base import Engine, EngineReport
from .kvm.probe import probe_kvm
from .qemu.engine import QemuEngine

ENGINES = ("auto", "kvm", "qemu")

_NO_KVM_ENGINE = "this version has no KVM engine yet"


async def choose_engine(name: str = "auto", assets: AssetPaths | None = None) -> Engine:
    """The engine called ``name``, or with ``"auto"`` the best one that can run a guest here.

    Cheap when repeated: what was found is remembered as long as the program stays the same.

    :raises EngineUnavailable: it, or none, can; ``tried`` says why.
    :raises ConfigError: there is no engine of that name.
    """
    if name not in ENGINES:
        raise ConfigError(f"no engine {name!r}; there are {', '.join(ENGINES)}")
    if name == "kvm":
        raise EngineUnavailable({"kvm": _NO_KVM_ENGINE})
    engine = QemuEngine(assets)
    report = await engine.probe()
    if report.available:
        return engine
    why = f"{report.detail}; to get it: {report.remedy}" if report.remedy else report.detail
    tried = {"kvm": _NO_KVM_ENGINE} if name == "auto" else {}
    raise EngineUnavailable({**tried, "qemu": why})


async def probe_engines() -> list[EngineReport]:
    """What each engine says, the preferred one first. For people: ``doctor`` prints it."""
    kvm = await probe_kvm()
    return [
        EngineReport(
            name="kvm",
            available=False,
            detail=f"{kvm.detail}; {_NO_KVM_ENGINE}",
            remedy=kvm.remedy,
        ),
        await QemuEngine().probe(),
    ]
