"""``scripts/kvm-lab`` runs a command where /dev/kvm is real, and changes nothing else about it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

LAB = Path(__file__).parents[2] / "scripts" / "kvm-lab"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab's file server needs root"),
    pytest.mark.skipif(
        shutil.which("qemu-system-x86_64") is None or shutil.which("apt-get") is None,
        reason="needs QEMU, and apt-get to fetch a kernel",
    ),
]

# What a lab's command does here: all of its ways to say something.
PROGRAM = """
import os, pathlib, resource, sys
print("out", sys.argv[1:], os.environ["GIVEN"], os.getcwd(), sys.stdin.read(), flush=True)
sys.stderr.write("err, not mixed with out\\n")
print(*sorted(os.sched_getaffinity(0)), flush=True)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)
with open("/dev/stdout", "wb") as again:
    again.write(bytes(range(256)))
pathlib.Path("kept/file").write_text("kept")
pathlib.Path("lost").write_text("lost")
os.close(os.open("/dev/kvm", os.O_RDWR))
sys.exit(7)
"""


def lab(*arguments: str, where: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [LAB, *arguments],
        cwd=where,
        env={**os.environ, "TMPDIR": str(where), **environment},
        capture_output=True,
        timeout=300,
        check=False,
    )


def left(where: Path) -> list[str]:
    return [name for name in os.listdir(where) if name.startswith("kvm-lab-")]


@pytest.fixture(autouse=True, scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The lab as it is after its first use, which may have to fetch programs and a kernel."""
    done = lab("true", where=tmp_path_factory.mktemp("first"))
    assert done.returncode == 0, done.stderr


def test_two_labs_at_once_run_their_commands_unchanged_or_end_by_the_limit(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    arguments = ["a b", "$HOME", "'\"\\", "", "ü"]
    with ThreadPoolExecutor() as threads:
        limited = threads.submit(
            lab, "-t", "60", "sh", "-c", "echo begun; sleep 1000", where=tmp_path
        )
        program = ("-o", "kept", sys.executable, "-c", PROGRAM, *arguments)
        done = lab(*program, where=tmp_path, GIVEN="x\ny'z")
    assert done.returncode == 7, done.stderr
    # Guests of the first processor fall.
    processors = range(1, min(len(os.sched_getaffinity(0)), 4) + 1)
    text = f"out {arguments} x\ny'z {tmp_path} \n{' '.join(map(str, processors))}\n"
    text += f"{min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 20)}\n"
    assert done.stdout == text.encode() + bytes(range(256))
    assert done.stderr == b"err, not mixed with out\n"
    assert (tmp_path / "kept" / "file").read_text() == "kept"
    assert not (tmp_path / "lost").exists()
    hung = limited.result()
    assert (hung.returncode, hung.stdout) == (124, b"begun\n"), hung.stderr
    assert hung.stderr == b"kvm-lab: ended after 60 seconds\n"
    assert left(tmp_path) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once(tmp_path: Path, signum: signal.Signals) -> None:
    with subprocess.Popen(
        # Whoever runs the tests may have them ignore some signals.
        ["env", "--default-signal=INT,HUP,TERM", LAB, "sh", "-c", "echo begun; sleep 1000"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        os.killpg(running.pid, signum)  # as a terminal does
        assert running.wait(10) == 128 + signum
        assert running.stdout.read() == b""
    assert left(tmp_path) == []


def test_a_lab_that_cannot_start_says_why(tmp_path: Path) -> None:
    done = lab("-m", "banana", "true", where=tmp_path)
    assert done.returncode == 125
    assert b"banana" in done.stderr
    assert left(tmp_path) == []
