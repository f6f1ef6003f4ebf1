"""Execs as the guest's agent runs them: programs, their ends, chains and staged files."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from ..support import guest_client as g
from ..support.guest_client import Agent, frame, start_agent
from ..support.guest_fixtures import agent, bare_agent, ping, run, wait_until_gone

__all__ = ["agent", "bare_agent"]  # fixtures

# --- programs ---


def test_output_errors_and_the_exit_code_come_back(agent: Agent) -> None:
    assert run(agent, "sh", "-c", "echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")


def test_a_signal_is_a_negative_exit_code(agent: Agent) -> None:
    assert run(agent, "sh", "-c", "kill -TERM $$")[0] == -signal.SIGTERM


def test_exit_tells_duration_and_peak_memory(agent: Agent) -> None:
    done = agent.exec(["python3", "-c", "x = bytearray(50_000_000)"]).finish()
    assert done.peak_rss_kib > 50_000_000 // 1024
    assert done.duration_us > 0


@pytest.mark.parametrize(
    ("argv", "options", "error"),
    [
        (["no-such-program"], {}, errno.ENOENT),
        (["/etc/passwd"], {}, errno.EACCES),
        (["./relative"], {}, errno.ENOENT),
        ([""], {}, errno.ENOENT),
        (["true"], {"cwd": "/no/such/directory"}, errno.ENOENT),
        (["true"], {"cwd": "/etc/passwd"}, errno.ENOTDIR),
        (["true"], {"user": "no-such-user"}, errno.ENOENT),
        (["true"], {"user": "root:no-such-group"}, errno.ENOENT),
        (["true", "x" * 200_000], {}, errno.E2BIG),
    ],
)
def test_a_program_that_cannot_start_is_an_error_with_its_errno(
    agent: Agent, argv: list[str], options: dict[str, str], error: int
) -> None:
    connection = agent.dial()
    connection.send(g.exec_request(argv, **options))  # type: ignore[arg-type]
    assert connection.error()[0] == error
    assert connection.wait_end() == "shut"


def test_a_script_without_an_interpreter_line_is_not_run_by_a_shell(
    agent: Agent, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("echo no\n")
    script.chmod(0o755)
    connection = agent.dial()
    connection.send(g.exec_request([str(script)]))
    assert connection.error()[0] == errno.ENOEXEC


def test_a_program_begins_in_a_clean_state(agent: Agent) -> None:
    script = """
import os, signal
print(sorted(os.listdir("/proc/self/fd"))[:3], len(os.listdir("/proc/self/fd")) - 1)
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), os.getpgrp() == os.getpid())
ignored = int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("SigIgn")), 16)
print(ignored & ~(1 << signal.SIGPIPE - 1) & ~(1 << 24), oct(os.umask(0)))  # python sets two
"""
    assert run(agent, "python3", "-c", script) == (
        0,
        b"['0', '1', '2'] 3\nset() True\n0 0o22\n",
        b"",
    )


def test_sigpipe_has_its_default_again(agent: Agent) -> None:
    assert run(agent, "grep", "SigIgn", "/proc/self/status")[1].split()[1] == b"0" * 16


def test_the_environment_adds_to_the_images_or_replaces_it(agent: Agent) -> None:
    got = run(agent, "env", env=["FROM=exec", "MORE=1"])[1].splitlines()
    assert {b"FROM=exec", b"MORE=1", b"HOME=/root"} <= set(got)
    assert len([line for line in got if line.startswith(b"FROM=")]) == 1
    assert run(agent, "env", env=["ONLY=1"], flags=g.EXACT_ENV)[1] == b"ONLY=1\n"


def test_path_is_looked_up_in_the_programs_own_environment(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "own-program"
    program.write_text("#!/bin/sh\necho own")
    program.chmod(0o755)
    path = f"/nowhere:{tmp_path}/bin"
    assert run(agent, "own-program", env=[f"PATH={path}"])[1] == b"own\n"
    assert run(agent, "own-program", env=["PATH=:x"], cwd="bin")[1] == b"own\n"


def test_cwd_is_relative_to_the_images(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    assert run(agent, "pwd")[1].decode() == f"{tmp_path}\n"
    assert run(agent, "pwd", cwd="below")[1].decode() == f"{tmp_path}/below\n"
    assert run(agent, "pwd", cwd="/usr")[1] == b"/usr\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes others")
@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "0 0 0"),
        ("daemon", "1 1 1"),
        ("1234", "1234 0 0"),
        ("1234:4321", "1234 4321 4321"),
        ("daemon:games", "1 60 60"),
        ("0", "0 0 0"),
    ],
)
def test_users_are_found_as_docker_finds_them(agent: Agent, user: str, expected: str) -> None:
    done = run(agent, "sh", "-c", "echo $(id -u) $(id -g) $(id -G)", user=user)
    assert done[1].decode().strip() == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes its root")
def test_users_come_from_the_images_own_files(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "bin").mkdir()
    tmp_path.chmod(0o755)
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:7:8::/home/app:/x\n")
    (tmp_path / "etc/group").write_text("app:x:8:\nextra:x:9:root,app\nother:x:10:root\n")
    (tmp_path / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (tmp_path / "bin/busybox").chmod(0o755)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/null").touch()
    with start_agent("--root", str(tmp_path)) as agent:
        agent.set_up(workdir="/srv/deep", user="app")
        assert (tmp_path / "srv/deep").is_dir()
        got = run(agent, "busybox", "sh", "-c", "busybox id -u; busybox id -G; echo $HOME; pwd")
        assert got == (0, b"7\n8 9\n/home/app\n/srv/deep\n", b"")


# --- the end of an exec ---


def test_a_reset_kills_the_whole_group(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "sh -c 'sleep 1000 & echo $!; wait' & wait"])
    done.until(lambda: done.output[1].endswith(b"\n"))
    done.connection.reset()
    wait_until_gone(agent, int(done.output[1]))
    wait_until_gone(agent, done.started())


def test_a_descendant_in_the_background_ends_with_the_connection(agent: Agent) -> None:
    returncode, output, _ = run(agent, "sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!")
    assert returncode == 0
    wait_until_gone(agent, int(output))


def test_a_descendant_with_its_own_session_outlives_it(agent: Agent) -> None:
    script = """
import os, time
if (pid := os.fork()):
    os.read(3, 1)
    print(pid)
else:
    os.setsid()
    os.close(0), os.close(1), os.close(2)
    os.write(4, b".")
    time.sleep(1000)
"""
    output = run(agent, "python3", "-c", f"import os; os.pipe()\n{script}")[1]
    ping(agent)
    os.kill(int(output), signal.SIGKILL)


def test_a_half_closed_connection_goes_on(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "sleep 0.1; echo done"])
    done.connection.shut(2)
    assert done.finish().returncode == 0
    assert done.output[1] == b"done\n"


def test_signals_reach_the_process_or_its_group_and_are_acknowledged(agent: Agent) -> None:
    script = "trap 'echo usr1' USR1; sleep 1000 & echo $!; while :; do wait; done"
    done = agent.exec(["sh", "-c", script])
    done.until(lambda: done.output[1].endswith(b"\n"))
    sleeper = int(done.output[1])
    assert done.signal(signal.SIGUSR1) == 0
    done.until(lambda: done.output[1].endswith(b"usr1\n"))
    assert Path(f"/proc/{sleeper}").exists()
    assert done.signal(1000) == errno.EINVAL
    assert done.signal(signal.SIGKILL, group=True) == 0
    wait_until_gone(agent, sleeper)
    assert done.finish().returncode == -signal.SIGKILL


def test_after_its_end_a_signal_finds_no_process_but_perhaps_its_group(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "sleep 1000 & echo $!"])
    done.until(lambda: done.exit is not None and bool(done.output[1]))
    assert done.signal(signal.SIGKILL) == errno.ESRCH
    assert done.signal(signal.SIGKILL, group=True) == 0
    wait_until_gone(agent, int(done.output[1]))
    assert done.finish().returncode == 0


def test_a_timeout_kills_the_group_and_says_so(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "sleep 1000 & echo $!; wait"], timeout_ms=100)
    end = done.finish()
    assert (end.returncode, end.flags) == (-signal.SIGKILL, 1)
    assert end.duration_us >= 100_000
    wait_until_gone(agent, int(done.output[1]))


def test_a_timeout_also_ends_what_holds_the_output_open(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "sleep 1000 &"], timeout_ms=100)
    assert done.finish().flags == 0


# --- chains and staged files ---


def test_a_chain_goes_on_after_success_only(agent: Agent) -> None:
    done = agent.exec(["echo", "1"], ["echo", "2"], ["sh", "-c", "exit 4"], ["echo", "no"])
    assert done.finish().returncode == 4
    assert done.output[1] == b"1\n2\n"


def test_a_chain_has_one_stdin_and_one_group(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "sleep 1000 & echo $!; read x; echo $x"], ["cat"], flags=g.STDIN)
    done.started()
    done.write(b"first\nsecond\n")
    done.until(lambda: done.output[1].endswith(b"second\n"))
    sleeper, *lines = done.output[1].split()
    assert lines == [b"first", b"second"]
    done.connection.reset()
    wait_until_gone(agent, int(sleeper))


def test_a_later_program_that_cannot_start_ends_the_chain_as_in_a_shell(agent: Agent) -> None:
    assert agent.exec(["true"], ["no-such-program"], ["true"]).finish().returncode == 127
    assert agent.exec(["true"], ["/etc/passwd"]).finish().returncode == 126


def test_staged_files_are_there_when_the_program_starts(agent: Agent, tmp_path: Path) -> None:
    big = os.urandom(300_000)
    connection = agent.dial()
    files = [("empty", 0o600, 0), ("script", 0o755, 17), (str(tmp_path / "big"), 0o640, len(big))]
    connection.send(g.exec_request(["./script"], files=files))
    connection.send(frame(g.DATA, b"#!/bin/sh\n", 3) + frame(g.DATA, b"echo ok", 3))
    for at in range(0, len(big), 60_000):
        connection.send(frame(g.DATA, big[at : at + 60_000], 3))
    done = g.Exec(connection)
    assert done.finish().returncode == 0
    assert done.output[1] == b"ok\n"
    assert (tmp_path / "big").read_bytes() == big
    assert (tmp_path / "big").stat().st_mode & 0o7777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "empty", "script"]


def test_a_file_that_cannot_be_staged_is_an_error_and_nothing_runs(
    agent: Agent, tmp_path: Path
) -> None:
    connection = agent.dial()
    request = g.exec_request(["touch", "ran"], files=[("no/such/place", 0o600, 3)])
    connection.send(request + frame(g.DATA, b"abc", 3))
    assert connection.error()[0] == errno.ENOENT
    assert connection.wait_end() == "shut"
    assert not list(tmp_path.iterdir())


def test_a_connection_that_ends_while_staging_leaves_nothing(agent: Agent, tmp_path: Path) -> None:
    connection = agent.dial()
    connection.send(g.exec_request(["touch", "ran"], files=[("half", 0o600, 10)]))
    connection.send(frame(g.DATA, b"12345", 3))
    ping(agent)
    assert [path.name[:4] for path in tmp_path.iterdir()] == [".tmp"]
    connection.reset()
    ping(agent)
    assert not list(tmp_path.iterdir())
