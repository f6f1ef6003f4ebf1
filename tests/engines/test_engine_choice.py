"""Which engine VMs get, and what is said where one cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from trio_supermachine import ConfigError, EngineUnavailable, Image, Vm, VmConfig
from trio_supermachine.hv.kvm.probe import probe_kvm
from trio_supermachine.hv.select import VARIABLE, choose_engine, probe_engines


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def doctor(**environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "trio_supermachine.cli", "doctor", "--json"],
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.stderr == b""
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    return report


async def test_auto_is_the_first_engine_that_can() -> None:
    reports = await probe_engines()
    assert [report.name for report in reports] == ["kvm", "qemu"]
    first = next(report.name for report in reports if report.available)
    assert (await choose_engine()).name == first


async def test_kvm_is_chosen_only_where_it_runs_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (await probe_kvm()).usable:
        assert (await choose_engine()).name == "qemu"
        with pytest.raises(EngineUnavailable) as caught:
            await choose_engine("kvm")
        assert list(caught.value.tried) == ["kvm"]
        (kvm, _) = await probe_engines()
        assert kvm.detail in str(caught.value)
        assert kvm.remedy is None or kvm.remedy in str(caught.value)
        assert str(caught.value).startswith(f"the engine kvm cannot start a VM here: {kvm.detail}")
        assert "; leave the engine out to use qemu" in str(caught.value)
        monkeypatch.setenv(VARIABLE, "kvm")
        with pytest.raises(EngineUnavailable, match=f"; unset {VARIABLE} to use qemu"):
            await choose_engine()
    else:
        assert (await choose_engine("kvm")).name == "kvm"


async def test_many_at_once_get_the_same_answer() -> None:
    found = set()

    async def choose() -> None:
        found.add((await choose_engine()).name)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(choose)
    assert found == {(await choose_engine()).name}


async def test_the_environment_says_what_auto_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "qemu")
    assert (await choose_engine()).name == "qemu"
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EngineUnavailable) as caught:
        await choose_engine()
    assert list(caught.value.tried) == ["qemu"]
    assert "qemu-system-x86" in caught.value.tried["qemu"]


async def test_a_name_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "kvm")
    assert (await choose_engine("qemu")).name == "qemu"


@pytest.mark.parametrize("name", ["xen", "KVM", "qemu "])
async def test_an_unknown_engine_is_a_mistake_with_a_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="auto, kvm, qemu"):
        await choose_engine(name)
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(ConfigError, match=f"{VARIABLE}={name}"):
        await choose_engine()
    assert (await choose_engine("qemu")).name == "qemu"


@pytest.mark.vm
async def test_a_restore_follows_its_snapshot_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, baked: Image
) -> None:
    assert baked.snapshot is not None
    made_on = baked.snapshot.metadata.engine
    monkeypatch.setenv(VARIABLE, "kvm" if made_on == "qemu" else "qemu")
    async with Vm.start(baked, VmConfig(require_restore=True)) as vm:
        assert (vm.engine, vm.started_by) == (made_on, "restore")


def test_doctor_says_for_each_engine_why() -> None:
    report = doctor()
    assert [engine["name"] for engine in report["engines"]] == ["kvm", "qemu"]
    assert all(engine["detail"] for engine in report["engines"])
    available = [engine["name"] for engine in report["engines"] if engine["available"]]
    assert report["engine"] == available[0]


def test_doctor_follows_the_environment() -> None:
    report = doctor(**{VARIABLE: "qemu"})
    assert (report["ok"], report["engine"]) == (True, "qemu")
    report = doctor(**{VARIABLE: "qemu", "PATH": "/nonexistent"})
    assert (report["ok"], report["engine"]) == (False, None)


def test_doctor_tells_an_engine_in_the_environment_that_there_is_not() -> None:
    report = doctor(**{VARIABLE: "xen"})
    assert not report["ok"]
    (check,) = (check for check in report["checks"] if check["name"] == "engine")
    assert check["state"] == "missing"
    assert f"{VARIABLE}=xen" in check["detail"]
    assert check["remedy"] == f"unset {VARIABLE}"


async def test_the_next_program_does_not_measure_the_device_again(tmp_path: Path) -> None:
    program = (
        "import sys, trio\n"
        "from trio_supermachine.hv.select import choose_engine, probe_engines\n"
        "print(trio.run(choose_engine).name, 'trio_supermachine.hv.kvm.probe' in sys.modules)\n"
        "trio.run(probe_engines)\n"
    )

    def run() -> list[str]:
        environment = {**os.environ, "TRIO_SUPERMACHINE_HOME": str(tmp_path)}
        command = [sys.executable, "-c", program]
        return subprocess.check_output(command, env=environment, text=True, timeout=120).split()

    found = await probe_kvm()
    name = "kvm" if found.usable else "qemu"
    assert await trio.to_thread.run_sync(run) == [name, "True"]
    # What could not be measured may be there the next time. Who uses KVM loads all of it.
    again = found.hardware_speed is None or found.usable
    assert await trio.to_thread.run_sync(run) == [name, str(again)]


@pytest.mark.parametrize("there", [True, False])
async def test_a_look_at_the_host_mends_a_record_and_makes_no_directory(
    there: bool, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    if there:
        home.mkdir()
    await trio.to_thread.run_sync(partial(doctor, TRIO_SUPERMACHINE_HOME=str(home)))
    measured = (await probe_kvm()).hardware_speed is not None
    assert home.exists() == there
    assert (home / "verified").exists() == (there and measured)
