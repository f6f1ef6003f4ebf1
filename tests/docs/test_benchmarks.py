"""The benchmarks run: each tells what it takes, and a small run of each kind ends in its table."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HELPERS = {"common", "raw_qemu", "layers"}  # the last has no options
PROGRAMS = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - HELPERS)


def run(name: str, *options: str) -> str:
    """What a benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=400)
    return done.stdout


def rows(output: str) -> dict[str, list[str]]:
    """The table's lines by what they are of: the engine is their last word."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        if row := re.fullmatch(r"(\S.{55}) +\d+\.\d\d +\d+\.\d\d (.{6}) (.+)", line):
            found.setdefault(row[1].strip(), []).append(row[3])
    return found


def needs_kvm_device() -> None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as exc:
        pytest.skip(f"/dev/kvm does not open: {exc}")


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_tells_the_options(name: str) -> None:
    assert re.search(r"^  --\w+ .*default: ", run(name, "--help"), re.M | re.S)


@pytest.mark.vm
def test_a_restore_is_timed_call_by_call() -> None:
    needs_kvm_device()
    output = run("kvm_restore_calls", "--rounds", "1")
    for call in ("KVM_CREATE_VM", "KVM_SET_MSRS", "close, after KVM_CREATE_VCPU", "mmap"):
        assert re.search(rf"^{call} +[1-9]", output, re.M), output
    assert "4 vCPUs, 1 disk: restore" in rows(output)


@pytest.mark.kvm
@pytest.mark.vm
def test_vms_on_kvm_leave_the_guest_for_no_exec_stream_or_read() -> None:
    table = rows(run("kvm_vms", "--rounds", "1", "--calls", "4", "--mib", "1"))
    assert table["stop"] == ["kvm"]
    assert table["one byte to cat and back, by pipes"] == ["host"]
    steady = ("of an exec", "of writing a file", "for each MB of stdout", "for each MB of stdin")
    for what in (*steady, "for each 1000 reads of a disk"):
        assert f"exits {what}" in table
        assert f"exits {what}, memory" not in table


@pytest.mark.kvm
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs QEMU")
def test_devices_stand_beside_those_of_qemu() -> None:
    table = rows(run("kvm_devices", "--rounds", "1", "--mib", "1", "--count", "8"))
    both = ["kvm", "qemu -accel kvm"]
    assert table["disk: read of 4 KiB"] == both
    assert table["vsock: guest to host"] == both
    assert table["virtio-serial: guest to host"] == both[1:]
