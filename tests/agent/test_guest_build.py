"""The programs in C: compiled, the same each time, and found."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from trio_supermachine import guest
from trio_supermachine.errors import AssetNotFound

GUEST = Path(guest.__file__).parent


def test_the_same_sources_give_the_same_program_wherever_they_are(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(GUEST, copy, ignore=shutil.ignore_patterns("bin", "__pycache__"))
    build = runpy.run_path(str(copy / "build.py"))["build"]
    for built in build(["x86_64"]):
        here = GUEST / "bin" / built.name
        assert built.read_bytes() == here.read_bytes(), "out of date: run guest/build.py"
        changed = built.stat().st_mtime_ns
        build(["x86_64"])
        assert built.stat().st_mtime_ns == changed
    assert not list((copy / "bin").glob("tmp*"))


def test_a_program_that_was_not_compiled_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "_BIN", tmp_path / "bin")
    for find in (guest.init_binary, guest.launcher_binary):
        with pytest.raises(AssetNotFound, match=r"build\.py"):
            find()


def test_processors_have_several_names() -> None:
    assert guest.init_binary("amd64") == guest.init_binary("x86_64")


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([guest.launcher_binary(), *arguments], capture_output=True, text=True)


def test_the_launcher_refuses_a_parent_that_is_not_its_own() -> None:
    assert launch("run", "1", "/bin/echo", "x").stdout == ""


def test_the_launchers_program_ends_with_its_parent(tmp_path: Path) -> None:
    script = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.argv[1], "run", str(os.getpid()), "/bin/sh", "-c",
    "echo $PPID $$; exec sleep 1000"], stdout=subprocess.PIPE)
print(child.stdout.readline().decode(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.Popen(
        ["python3", "-c", script, str(guest.launcher_binary())], stdout=subprocess.PIPE
    )
    # The pipe's other end is the child's, too: end of file is the end of both.
    output, _ = parent.communicate()
    assert int(output.split()[0]) == parent.pid


def test_the_launcher_reports_what_cannot_be_executed() -> None:
    done = launch("run", str(os.getpid()), "/no/such/program")
    assert done.returncode == 127
    assert "/no/such/program" in done.stderr
    assert launch().returncode == 2


def test_the_time_stamp_counter_is_measured() -> None:
    assert 100_000 < int(launch("tsc-khz").stdout) < 10_000_000
