"""What a probe of ``/dev/kvm`` found, kept on the disk for later programs.

Where the device emulates supervisor code, the probe takes a quarter of a second of processor time.
A record holds as long as all that the answer depends on: the device and who may open it, the boot
(so also the hardware and its settings), the kernel and the version of this package. A module of
KVM that is loaded anew makes the device anew. So a record needs no bound on its age.

A record that is damaged, or of anything else, counts as none. ``doctor`` measures anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .._version import __version__
from ..host.verified import Identity, VerifiedFiles
from .base import EngineReport

#: The device of KVM.
DEVICE: Final = "/dev/kvm"

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_PLACE: Final = "the probe of "
_ANSWERS: Final = {"usable": True, "unusable": False}


def device_identity(device: str = DEVICE) -> Identity | None:
    """Give what must stay as it is for a probe's result to hold; ``None`` without a device."""
    try:
        found = os.stat(device)
    except OSError:
        return None
    groups = (os.geteuid(), *os.getgroups())
    who = (found.st_mode, found.st_uid, found.st_gid, *groups)
    return (found.st_dev, found.st_ino, *who, found.st_ctime_ns)


def recall(found: Identity, device: str = DEVICE) -> EngineReport | None:
    """Give the report that :func:`remember` kept, if it still holds."""
    facts = VerifiedFiles().recall(_PLACE + device, found)
    surroundings = _surroundings()
    if facts is None or surroundings is None or list(facts[:3]) != surroundings:
        return None
    match facts[3:]:
        case [answer, detail, remedy] if answer in _ANSWERS:
            return EngineReport(
                name="kvm", available=_ANSWERS[answer], detail=detail, remedy=remedy or None
            )
    return None


def remember(found: Identity, report: EngineReport, device: str = DEVICE) -> None:
    """Keep what a probe measured; its failure is a later probe's cost, so this raises nothing."""
    surroundings = _surroundings()
    if surroundings is not None:
        answer = "usable" if report.available else "unusable"
        facts = (*surroundings, answer, report.detail, report.remedy or "")
        VerifiedFiles().remember(_PLACE + device, found, *facts)


def _surroundings() -> Sequence[str] | None:
    """Name this boot, its kernel and this package; ``None`` where the boot has no name."""
    try:
        boot = _BOOT.read_text().strip()
    except OSError:
        return None
    return [boot, os.uname().release, __version__] if boot else None
