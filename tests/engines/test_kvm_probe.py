"""The probe tells a usable ``/dev/kvm`` from one that is missing, closed, or only emulates."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from trio_supermachine.hv.kvm.probe import probe_kvm


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _real_device() -> None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as exc:
        pytest.skip(f"/dev/kvm does not open: {exc}")


async def test_a_missing_device_is_answered_with_the_module_to_load(tmp_path: Path) -> None:
    found = await probe_kvm(str(tmp_path / "kvm"))
    assert not found.opens
    assert not found.usable
    assert found.remedy is not None
    assert "modprobe" in found.remedy


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Root may open every file, so be somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


async def test_a_closed_device_is_answered_with_the_group_to_join(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0)
    with _as_nobody():
        found = await probe_kvm(str(device))
    assert not found.opens
    assert found.remedy is not None
    assert "usermod -aG kvm" in found.remedy


async def test_a_device_that_is_not_kvm_is_reported_and_never_raises() -> None:
    found = await probe_kvm("/dev/null")
    assert found.opens
    assert found.hardware_speed is None
    assert not found.usable
    assert "does not run" in found.detail


async def test_a_package_built_without_the_binding_still_gives_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("trio_supermachine.hv.kvm.api", raising=False)
    monkeypatch.setitem(sys.modules, "trio_supermachine.hv.kvm.api", None)
    found = await probe_kvm("/dev/null")
    assert found.opens
    assert not found.usable
    assert "built without" in found.detail
    assert found.remedy is not None
    assert "python3-dev" in found.remedy


async def test_the_real_device_gets_a_verdict_that_follows_from_the_measured_rate() -> None:
    _real_device()
    found = await probe_kvm()
    assert found.opens
    assert found.instructions_per_second is not None
    assert found.hardware_speed is (found.instructions_per_second >= 5_000_000)
    assert ("emulates supervisor code" in found.detail) is (not found.hardware_speed)


@pytest.mark.skipif(not Path("/sys/module/kvm_pvm").exists(), reason="KVM here is not kvm_pvm")
async def test_the_module_that_emulates_ordinary_guests_is_not_usable() -> None:
    _real_device()
    assert not (await probe_kvm()).usable


async def test_probes_side_by_side_leave_no_descriptor_open() -> None:
    _real_device()
    await probe_kvm()
    before = _descriptors()
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(probe_kvm)
    assert _descriptors() == before


async def test_a_cancelled_probe_leaves_no_descriptor_open() -> None:
    _real_device()
    await probe_kvm()
    before = _descriptors()
    with trio.CancelScope() as scope:
        scope.cancel()
        await probe_kvm()
    assert _descriptors() == before
