"""Every program in ``benchmarks/`` takes each of its paths once, and ends in its tables."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import trio

from trio_supermachine.hv.kvm.probe import KvmProbe, probe_kvm

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = sorted(
    path.stem for path in BENCHMARKS.glob("*.py") if "\nif __name__ ==" in path.read_text()
)
#: What a program returns that lacks a tool, and one that lacks KVM.
UNAVAILABLE, NO_KVM = 69, 77
HEAD = ["median", "p99", "unit", "baseline", "ratio", "engine"]

pytestmark = pytest.mark.vm


def run(name: str, *options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / f"{name}.py", *options]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)


@cache
def kvm() -> KvmProbe:
    return trio.run(probe_kvm)


def serves(name: str) -> bool:
    """Whether this host has what the program needs of KVM."""
    if name == "kvm_restore_calls":  # makes machines that run nothing
        return kvm().opens
    return kvm().usable or not name.startswith("kvm_")


class Results:
    """What smoke runs printed and wrote: each program runs once for all tests."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def of(self, name: str) -> tuple[str, dict[str, Any]]:
        text, file = self.directory / f"{name}.txt", self.directory / f"{name}.json"
        if not text.exists():
            done = run(name, "--smoke", "--json", file, *self._data(name))
            if not serves(name):
                assert done.returncode == NO_KVM
                assert done.stdout == ""
                assert re.fullmatch(rf"{name}: /dev/kvm.*; --lab runs it in .*\n", done.stderr)
                pytest.skip(done.stderr)
            assert done.returncode == 0, done.stderr
            text.write_text(done.stdout)
        return text.read_text(), json.loads(file.read_text())

    def table(self, name: str) -> dict[str, list[str]]:
        """Who did each thing in the tables of a program."""
        found: dict[str, list[str]] = {}
        for table in self.of(name)[1]["tables"]:
            for row in table["rows"]:
                found.setdefault(row["name"], []).append(row["engine"])
        return found

    def _data(self, name: str) -> list[str | Path]:
        """Options by which a program finds the results of others."""
        if name != "plot":
            return []
        for other in ("boot", "pool", "restore", "streams"):
            self.of(other)
        return ["--data", self.directory]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("benchmarks"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_tells_the_options(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  --\w+ .*default: .*with --smoke: ", done.stdout, re.M | re.S)
    assert "--smoke " in done.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_smoke_run_ends_in_tables(name: str, results: Results) -> None:
    output, document = results.of(name)
    lines = output.splitlines()
    assert document["benchmark"] == name
    assert document["smoke"] is True
    assert len(document["tables"]) == sum(line.split() == HEAD for line in lines) > 0
    for table in document["tables"]:
        assert table["rows"]
        for row in table["rows"]:
            assert row["count"] > 0
            assert math.isfinite(row["median"])
            assert math.isfinite(row["p99"])
            numbers = rf" +{row['median']:.2f} +{row['p99']:.2f} +{row['unit']} .*{row['engine']}"
            assert any(re.match(re.escape(row["name"]) + numbers, line) for line in lines), row


#: A row of each that has a baseline, and who the baseline is of.
BASELINES = {
    "boot": ("boot to the agent's greeting", "raw QEMU"),
    "layers": ("large files, 1.0 MiB, gzip", "sqfstar"),
    "network": ("short HTTP requests, wrk -t1 -c8", "host"),
    "pull": ("pull and convert", "by hand"),
    "restore": ("nothing to the first exec", "raw QEMU"),
    "startup": ("--help", "Python"),
    "streams": ("run_process(['true'])", "host"),
    "vsock_mux": ("one-byte round trip", "socket pair"),
}


@pytest.mark.parametrize("name", BASELINES)
def test_the_baseline_stands_beside_what_is_measured(name: str, results: Results) -> None:
    title, by = BASELINES[name]
    rows = [row for table in results.of(name)[1]["tables"] for row in table["rows"]]
    (row,) = (row for row in rows if row["name"] == title and row["baseline"] is not None)
    beside = row["baseline"]
    assert beside["engine"] == by != row["engine"]
    (other,) = (r for r in rows if (r["name"], r["engine"]) == (beside["name"], by))
    assert other["median"] == beside["median"]
    assert row["ratio"] == pytest.approx(row["median"] / other["median"])


def test_a_start_is_told_step_by_step(results: Results) -> None:
    rows = [row for table in results.of("startup")[1]["tables"] for row in table["rows"]]
    steps = [row for row in rows if row["name"].startswith("run: step: ")]
    assert len(steps) == 7
    assert all(row["median"] > 0 for row in steps)
    tables = results.of("startup")[1]["tables"]
    assert [table["title"].partition(":")[0] for table in tables[1:]] == [
        "imports of import trio_supermachine",
        "imports of --help",
        "imports of run of true",
    ]


def test_results_are_drawn(results: Results, tmp_path: Path) -> None:
    results.of("plot")
    file = tmp_path / "picture.svg"
    done = run("plot", "--data", results.directory, "--out", file)
    assert done.returncode == 0, done.stderr
    picture = ElementTree.parse(file).getroot()
    texts = [element.text or "" for element in picture.findall(".//{*}text")]
    assert "Hand-over of a pool's VM" in texts
    assert any("smoke run" in text for text in texts)  # nobody takes it for measured
    bars = [float(bar.get("width", "")) for bar in picture.findall(".//{*}rect")][1:]
    assert len(bars) == 10
    assert all(0 < width < 760 for width in bars)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "boot",
            "needs qemu-system-x86_64, busybox, cpio:"
            " apt-get install qemu-system-x86 busybox-static cpio",
        ),
        (
            "pull",
            "needs sqfstar, skopeo, docker-registry:"
            " apt-get install squashfs-tools skopeo docker-registry",
        ),
    ],
)
def test_missing_tools_are_told_in_a_line(name: str, line: str, tmp_path: Path) -> None:
    done = run(name, "--smoke", PATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (UNAVAILABLE, "", f"{name}: {line}\n")


def test_a_restore_is_timed_call_by_call(results: Results) -> None:
    table = results.table("kvm_restore_calls")
    for call in ("KVM_CREATE_VM", "KVM_SET_MSRS", "close, after KVM_CREATE_VCPU", "mmap"):
        assert any(re.fullmatch(rf"{call}, [1-9]\d* times", name) for name in table), call
    assert "4 vCPUs, 1 disk: restore" in table


@pytest.mark.kvm
def test_vms_on_kvm_leave_the_guest_for_no_exec_stream_or_read(results: Results) -> None:
    table = results.table("kvm_vms")
    assert table["stop"] == ["kvm"]
    assert table["one byte to cat and back, by pipes"] == ["host"]
    steady = ("of an exec", "of writing a file", "for each MB of stdout", "for each MB of stdin")
    for what in (*steady, "for each 1000 reads of a disk"):
        assert f"exits {what}" in table
        assert f"exits {what}, memory" not in table


@pytest.mark.kvm
def test_devices_stand_beside_those_of_qemu(results: Results) -> None:
    table = results.table("kvm_devices")
    both = ["kvm", "qemu -accel kvm"]
    assert table["disk: read of 4 KiB"] == both
    assert table["vsock: guest to host"] == both
    assert table["virtio-serial: guest to host"] == both[1:]
