"""``scripts/parts.py`` runs commands side by side: none is lost, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

PROGRAM = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import parts, trio
from pathlib import Path
parts.GRACE = 0.5
parts.RESULTS = Path("results")
commands = [argument.split("|") for argument in sys.argv[1:]]
chosen = [parts.Part(*(word or None for word in words)) for words in commands]
sys.exit(trio.run(parts.main, chosen))
"""


def start(where: Path, *commands: str) -> subprocess.Popen[str]:
    """Run commands, each ``name|command|part that it needs|part that it comes after``."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *commands],
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_last_line_sums_up_and_all_well_is_status_0(tmp_path: Path) -> None:
    meeting = f"{tmp_path}/meeting"
    os.mkfifo(meeting)  # each end waits for the other: they run side by side
    process = start(
        tmp_path,
        f"one|echo there >{meeting}; echo '=== 3 passed, 1 skipped in 0.10s ==='",
        f"two|cat {meeting}; echo '1 passed in 12.00s'; echo '== 2 passed in 99.1s (0:01:39) =='"
        f"; touch {meeting}.over",
        f"three|test -e {meeting}.over && echo after 1 failed thing||two",
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert out.splitlines()[-1] == "6 passed, 0 failed, 1 skipped"
    assert "there\n1 passed" in out  # a part's output is in one piece


def test_a_part_that_fails_fails_the_whole_and_is_shown_last(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        "bad|echo 'FAILED tests/x.py::y - why'; echo '= 1 failed, 4 passed in 1.00s ='; exit 1",
        "worse|echo no summary; exit 3",
        f"never|touch {tmp_path}/never|worse",
        "good|echo '= 2 passed, 1 error in 3.00s ='|bad",
        "other|sleep 1; echo '= 5 passed in 0.50s ='",
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.splitlines()[-1] == "9 passed, 2 failed, 0 skipped"
    end = out[out.index("slowest tests") :]
    assert "bad failed with status 1:\nFAILED tests/x.py::y - why\n" in end
    assert "worse failed with status 3:\nno summary\n" in end
    assert "never does not run: worse failed" in err
    assert "good does not run: bad failed" in err
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_that_runs(tmp_path: Path, signum: signal.Signals) -> None:
    alive, stubborn = tmp_path / "alive", tmp_path / "stubborn"
    os.mkfifo(alive)
    os.mkfifo(stubborn)
    process = start(
        tmp_path,
        f"one|exec 3>{alive}; sleep 1000 & sleep 1000",
        f"two|trap '' INT TERM; exec 3>{stubborn}; sleep 1000",
    )
    with alive.open() as first, stubborn.open() as second:
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "ended by a signal" in err
        # Nobody is left who has these open.
        assert first.read() == second.read() == ""
