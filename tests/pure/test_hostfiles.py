"""Files on the host appear whole or not at all, and locks exclude tasks and programs."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from trio_supermachine.host import files as hostfiles
from trio_supermachine.host.locks import locked

from ..support.guests import read_until


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", "/somewhere")
    assert hostfiles.home() == Path("/somewhere")
    monkeypatch.delenv("TRIO_SUPERMACHINE_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert hostfiles.home() == Path("/data/trio-supermachine")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert hostfiles.home() == Path("/home/me/.local/share/trio-supermachine")


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True)])
def test_offline(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_OFFLINE", value)
    assert hostfiles.offline() is expected


def test_a_file_is_published_at_the_end_of_the_block(tmp_path: Path) -> None:
    dest = tmp_path / "sub" / "file"
    with hostfiles.new_file(dest) as temporary:
        temporary.write_text("new")
        assert not dest.exists()
    assert dest.read_text() == "new"
    with pytest.raises(KeyError), hostfiles.new_file(dest) as temporary:
        temporary.write_text("newer")
        raise KeyError
    assert dest.read_text() == "new"
    assert list(dest.parent.iterdir()) == [dest]


def test_a_directory_is_published_at_the_end_of_the_block(tmp_path: Path) -> None:
    dest = tmp_path / "dir"
    with hostfiles.new_directory(dest) as temporary:
        (temporary / "a").write_text("a")
        assert not dest.exists()
    assert (dest / "a").read_text() == "a"
    with pytest.raises(OSError, match="not empty"), hostfiles.new_directory(dest):
        pass
    assert list(tmp_path.iterdir()) == [dest]


def test_sweep_removes_what_killed_programs_left(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from trio_supermachine.host import files as hostfiles\n"
        "with hostfiles.new_file(Path(sys.argv[1]) / 'f') as f, "
        "hostfiles.new_directory(Path(sys.argv[1]) / 'd') as d:\n"
        "    (d / 'x').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    (tmp_path / "kept").touch()
    assert len(list(tmp_path.iterdir())) == 3
    hostfiles.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


async def test_a_lock_excludes_other_tasks_and_waiting_is_cancellable(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    async with locked(lock):
        with trio.move_on_after(0.05) as scope:
            async with locked(lock):
                pytest.fail("two holders")
        assert scope.cancelled_caught
    async with locked(lock):
        pass
    assert lock.exists()


async def test_a_killed_program_drops_its_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    program = (
        "import sys, trio; from pathlib import Path\n"
        "from trio_supermachine.host.locks import locked\n"
        "async def main():\n"
        "    async with locked(Path(sys.argv[1])):\n"
        "        print('held', flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, "-c", program, str(lock)],
                stdout=subprocess.PIPE,
                check=False,
            )
        )
        assert process.stdout is not None
        async with process.stdout:
            assert await read_until(process.stdout, b"\n") == b"held\n"
            with trio.move_on_after(0.05) as scope:
                async with locked(lock):
                    pytest.fail("two holders")
            assert scope.cancelled_caught
            process.kill()
            async with locked(lock):
                pass
