"""``trio-supermachine doctor``, ``--help`` and ``--version``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trio_supermachine._version as version

PROGRAM = [sys.executable, "-m", "trio_supermachine.cli"]


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def doctor(**environment: str) -> tuple[int, dict[str, Any]]:
    done = cli("doctor", "--json", **environment)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def by_name(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (item for item in report["checks"] + report["engines"] if item["name"] == name)
    return found  # type: ignore[no-any-return]


def test_doctor_finds_that_this_host_can_start_vms(engine_name: str) -> None:
    code, report = doctor()
    assert code == 0
    assert report["ok"] is True
    assert by_name(report, "qemu")["available"]
    names = {check["name"] for check in report["checks"]}
    assert {"python", "trio", "kernel", "squashfs-tools", "e2fsprogs", "memory", "cores"} <= names
    done = cli("doctor")
    assert done.returncode == 0
    assert f"on the engine {engine_name}" in done.stdout


def test_doctor_names_what_to_install_where_there_is_no_engine() -> None:
    code, report = doctor(PATH="/nonexistent")
    assert code == 1
    assert report["ok"] is False
    assert not by_name(report, "qemu")["available"]
    assert "qemu-system-x86" in by_name(report, "qemu")["remedy"]
    assert by_name(report, "squashfs-tools")["remedy"] == "apt-get install squashfs-tools"
    done = cli("doctor", PATH="/nonexistent")
    assert done.returncode == 1
    assert "-> apt-get install squashfs-tools" in done.stdout


def test_doctor_tells_how_to_get_a_kernel_and_fetches_none(tmp_path: Path) -> None:
    home = tmp_path / "home"
    code, report = doctor(TRIO_SUPERMACHINE_HOME=str(home), TRIO_SUPERMACHINE_OFFLINE="1")
    assert code == 1
    kernel = by_name(report, "kernel")
    assert kernel["state"] == "missing"
    assert "TRIO_SUPERMACHINE_OFFLINE" in kernel["remedy"]
    assert not home.exists()


def test_doctor_refuses_a_data_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, report = doctor(TRIO_SUPERMACHINE_HOME=str(tmp_path / "file" / "below"))
    assert code == 1
    assert by_name(report, "data directory")["state"] == "missing"


def test_the_version_is_the_packages() -> None:
    assert cli("--version").stdout.strip().endswith(version.__version__)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["doctor", "--help"]])
def test_help_fits_its_width_and_comes_on_stdout(arguments: list[str]) -> None:
    done = cli(*arguments)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: trio-supermachine")
    assert done.stderr == ""


def test_an_unknown_command_is_a_usage_error() -> None:
    done = cli("fly")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("trio-supermachine: error: ")


def test_without_click_the_message_names_what_to_install(tmp_path: Path) -> None:
    # As an installation without the extra: the module cannot be found.
    (tmp_path / "click.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'click'\", name='click')\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = cli("doctor", PYTHONPATH=path)
    assert done.returncode == 1
    assert "pip install 'trio-supermachine[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
