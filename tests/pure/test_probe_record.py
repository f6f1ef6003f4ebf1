"""What a probe of the device found is kept for as long as it holds, and no longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trio_supermachine.host.verified import Identity
from trio_supermachine.hv import probed
from trio_supermachine.hv.base import EngineReport

USABLE = EngineReport(name="kvm", available=True, detail="at hardware speed", remedy=None)
SLOW = EngineReport(name="kvm", available=False, detail="it emulates — slowly", remedy="another")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "boot_id"
    file.write_text("one\n")
    monkeypatch.setattr(probed, "_BOOT", file)
    return file


@pytest.fixture
def device(tmp_path: Path, home: Path, boot: Path) -> str:
    """A file in the place of the device, as old as a device is when somebody probes it."""
    return str(_make(tmp_path / "kvm"))


def _make(file: Path) -> Path:
    file.write_bytes(b"")
    made = os.stat(file).st_ctime_ns
    beside = file.with_name("clock")
    while True:  # until the file system's clock is past what counts as the same moment
        beside.write_bytes(b"")
        if os.stat(beside).st_ctime_ns > made + 50_000_000:
            return file


def identity(device: str) -> Identity:
    found = probed.device_identity(device)
    assert found is not None
    return found


@pytest.mark.parametrize("report", [USABLE, SLOW], ids=["usable", "unusable"])
def test_what_was_found_is_found_again(device: str, report: EngineReport) -> None:
    assert probed.recall(identity(device), device) is None
    probed.remember(identity(device), report, device)
    assert probed.recall(identity(device), device) == report


def test_a_newer_answer_takes_the_place_of_the_older(device: str, home: Path) -> None:
    probed.remember(identity(device), USABLE, device)
    probed.remember(identity(device), SLOW, device)
    assert probed.recall(identity(device), device) == SLOW
    assert len(list(home.rglob("*"))) == 2  # a directory and the record


def test_it_does_not_hold_after_another_boot(device: str, boot: Path) -> None:
    probed.remember(identity(device), USABLE, device)
    boot.write_text("two\n")
    assert probed.recall(identity(device), device) is None


def test_nothing_is_kept_where_the_boot_has_no_name(device: str, boot: Path) -> None:
    probed.remember(identity(device), USABLE, device)
    boot.unlink()
    assert probed.recall(identity(device), device) is None
    probed.remember(identity(device), USABLE, device)
    boot.write_text("")
    assert probed.recall(identity(device), device) is None


def test_it_does_not_hold_for_another_version_or_kernel(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed.remember(identity(device), USABLE, device)
    with monkeypatch.context() as other:
        other.setattr(probed, "__version__", "0.0.other")
        assert probed.recall(identity(device), device) is None
    with monkeypatch.context() as other:
        names = list(os.uname())
        names[2] += "-other"
        other.setattr(os, "uname", lambda: os.uname_result(names))
        assert probed.recall(identity(device), device) is None
    assert probed.recall(identity(device), device) == USABLE


def test_it_does_not_hold_for_a_device_that_was_made_anew(device: str) -> None:
    probed.remember(identity(device), USABLE, device)
    os.unlink(device)
    assert probed.device_identity(device) is None
    _make(Path(device))
    assert probed.recall(identity(device), device) is None


def test_it_does_not_hold_when_somebody_else_may_open_the_device(device: str) -> None:
    probed.remember(identity(device), USABLE, device)
    os.chmod(device, 0o600)
    assert probed.recall(identity(device), device) is None


def test_it_does_not_hold_for_somebody_in_other_groups(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed.remember(identity(device), USABLE, device)
    groups = [*os.getgroups(), 4242]
    monkeypatch.setattr(os, "getgroups", lambda: groups)
    assert probed.recall(identity(device), device) is None


def test_a_damaged_record_counts_as_none(device: str, home: Path) -> None:
    probed.remember(identity(device), USABLE, device)
    (record,) = (file for file in home.rglob("*") if file.is_file())
    whole = record.read_text()
    damaged = [whole[:size] for size in range(len(whole))]
    damaged += [whole.replace('"usable"', '"true"'), whole.replace('"usable"', "true")]
    damaged += [whole.replace('"at hardware speed", ', ""), "null", "{}", whole + "]"]
    for text in damaged:
        record.write_text(text)
        assert probed.recall(identity(device), device) is None
    record.write_bytes(b"\xff" + whole.encode())
    assert probed.recall(identity(device), device) is None
    probed.remember(identity(device), SLOW, device)
    assert probed.recall(identity(device), device) == SLOW


def test_a_record_that_cannot_be_written_costs_nothing_else(device: str, home: Path) -> None:
    home.write_text("no directory")
    probed.remember(identity(device), USABLE, device)
    assert probed.recall(identity(device), device) is None
