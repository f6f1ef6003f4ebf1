"""The guest's agent, run as an ordinary process: what it does for a host, and to a bad one."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import guest_client as g
from .guest_client import Agent, frame, start_agent, string, u32


@pytest.fixture
def bare_agent() -> Iterator[Agent]:
    with start_agent() as agent:
        yield agent


@pytest.fixture
def agent(bare_agent: Agent, tmp_path: Path) -> Agent:
    bare_agent.set_up(env=["FROM=image", f"PATH={os.environ['PATH']}"], workdir=str(tmp_path))
    return bare_agent


def run(agent: Agent, *argv: str, **options: object) -> tuple[int, bytes, bytes]:
    done = agent.exec(argv, **options)
    returncode = done.finish().returncode
    return returncode, bytes(done.output[1]), bytes(done.output[2])


def wait_until_gone(agent: Agent, pid: int) -> None:
    """Until a descendant of the agent has ended, the agent being free to work meanwhile."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        assert poll.poll(g.PATIENCE * 1000), f"{pid} lives on"
    finally:
        os.close(watch)


def open_fds(agent: Agent) -> int:
    return len(os.listdir(f"/proc/{agent.process.pid}/fd"))


def ping(agent: Agent) -> int:
    connection = agent.dial()
    connection.send(frame(g.PING))
    (value,) = struct.unpack("<Q", connection.expect(g.OK))
    assert connection.wait_end() == "shut"
    return int(value)


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
        agent.set_up(workdir="/work/deep", user="app")
        assert (tmp_path / "work/deep").is_dir()
        got = run(agent, "busybox", "sh", "-c", "busybox id -u; busybox id -G; echo $HOME; pwd")
        assert got == (0, b"7\n8 9\n/home/app\n/work/deep\n", b"")


# --- streams ---


def test_stdin_reaches_the_program_and_ends(agent: Agent) -> None:
    data = os.urandom(1_000_000)
    done = agent.exec(["sh", "-c", "cat >copy; wc -c <copy; md5sum copy"], flags=g.STDIN)
    done.started()
    done.write(data)
    done.end_stdin()
    assert done.finish().returncode == 0
    assert done.output[1].split()[0] == b"1000000"


def test_a_program_that_does_not_read_holds_its_writer_back(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "read line; echo $line; exec sleep 1000"], flags=g.STDIN)
    done.started()
    done.write(b"first\n" + bytes(150_000))
    while done.credit:
        done.write(bytes(min(done.credit, 4096)))
    done.until(lambda: done.output[1] == b"first\n")
    assert ping(agent)
    assert done.signal(signal.SIGKILL) == 0
    assert done.finish().returncode == -signal.SIGKILL


def test_stdin_beyond_its_window_breaks_the_connection(agent: Agent) -> None:
    done = agent.exec(["sleep", "1000"], flags=g.STDIN)
    done.started()
    done.until(lambda: done.credit > 0)
    with contextlib.suppress(BrokenPipeError):
        for _ in range(20):  # the pipe takes some
            done.connection.send(frame(g.DATA, bytes(65536)))
    assert done.connection.wait_end() == "reset"
    wait_until_gone(agent, done.started())


def test_a_program_that_closes_stdin_tells_so(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "exec <&-; exec sleep 1000"], flags=g.STDIN)
    done.until(lambda: done.stdin_closed)
    done.connection.reset()


def test_without_stdin_it_is_empty(agent: Agent) -> None:
    assert run(agent, "cat") == (0, b"", b"")


def test_output_stays_within_its_window(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "yes; true"], window=10_000)
    done.until(lambda: len(done.output[1]) == 10_000)
    ping(agent)
    done.grant(1, 500)
    done.until(lambda: len(done.output[1]) == 10_500)
    ping(agent)
    assert not done.connection.frames
    done.connection.reset()


def test_a_stream_without_credit_does_not_block_the_other(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "yes & exec yes err >&2"], window=1000)
    done.until(lambda: len(done.output[1]) == len(done.output[2]) == 1000)
    done.grant(2, 5_000_000)
    done.until(lambda: len(done.output[2]) == 5_001_000)
    assert len(done.output[1]) == 1000
    done.connection.reset()


@pytest.mark.parametrize(
    ("flags", "streams", "output"),
    [
        (g.NULL_STDOUT, {2}, (b"", b"err\n")),
        (g.NULL_STDERR, {1}, (b"out\n", b"")),
        (g.NULL_STDOUT | g.NULL_STDERR, set(), (b"", b"")),
        (g.MERGE_STDERR, {1}, (b"out\nerr\n", b"")),
        (g.MERGE_STDERR | g.NULL_STDOUT, set(), (b"", b"")),
    ],
)
def test_streams_that_the_flags_leave_out_say_nothing(
    agent: Agent, flags: int, streams: set[int], output: tuple[bytes, bytes]
) -> None:
    done = agent.exec(["sh", "-c", "echo out; echo err >&2"], flags=flags)
    assert done.finish().returncode == 0
    assert (bytes(done.output[1]), bytes(done.output[2])) == output
    assert done.ends == streams


def test_close_gives_the_program_sigpipe(agent: Agent) -> None:
    done = agent.exec(["yes"], window=1000)
    done.started()
    done.close(1)
    assert done.finish().returncode == -signal.SIGPIPE
    assert 1 not in done.ends


def test_a_descendant_that_holds_output_open_does_not_delay_exit(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "sleep 1000 & echo $!"])
    done.until(lambda: done.exit is not None and bool(done.output[1]))
    assert done.ends == {2} or not done.ends
    assert done.connection.ended is None
    descendant = int(done.output[1])
    done.connection.shut()
    wait_until_gone(agent, descendant)


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


# --- terminals ---


def test_a_terminal_has_a_size_that_changes(agent: Agent) -> None:
    script = "trap 'stty size' WINCH; stty size; while :; do sleep 0.05; done"
    done = agent.exec(["sh", "-c", script], flags=g.TERMINAL | g.STDIN, size=(101, 33))
    done.until(lambda: done.output[1] == b"33 101\r\n")
    done.connection.send(frame(g.RESIZE, struct.pack("<HH", 90, 20)))
    done.until(lambda: done.output[1].endswith(b"20 90\r\n"))
    done.write(b"\x03")
    assert done.finish().returncode == -signal.SIGINT


def test_the_size_of_a_terminal_is_80_by_24_unless_told(agent: Agent) -> None:
    assert run(agent, "stty", "size", flags=g.TERMINAL | g.STDIN)[1] == b"24 80\r\n"


def test_a_terminal_is_the_controlling_one_and_its_program_leads_a_session(agent: Agent) -> None:
    script = "import os; os.open('/dev/tty', 2); print(os.getsid(0) == os.getpid(), os.isatty(2))"
    assert run(agent, "python3", "-c", script, flags=g.TERMINAL)[1] == b"True True\r\n"


@pytest.mark.parametrize("text", [b"line\n", b"half a line"])
def test_the_end_of_a_terminals_input_is_its_end_of_file(agent: Agent, text: bytes) -> None:
    done = agent.exec(["sh", "-c", "stty -echo; echo; cat"], flags=g.TERMINAL | g.STDIN)
    done.until(lambda: done.output[1] == b"\r\n")
    done.write(text)
    done.end_stdin()
    assert done.finish().returncode == 0
    assert done.output[1].replace(b"\r\n", b"\n") == b"\n" + text


def test_all_output_of_a_terminal_arrives(agent: Agent) -> None:
    done = agent.exec(["seq", "100000"], flags=g.TERMINAL, window=1 << 30)
    assert done.finish().returncode == 0
    assert len(done.output[1].split()) == 100_000


def test_a_chain_on_a_terminal_keeps_it(agent: Agent) -> None:
    done = agent.exec(["tty"], ["tty"], ["sh", "-c", "exit 5"], flags=g.TERMINAL | g.STDIN)
    assert done.finish().returncode == 5
    first, second = done.output[1].split()
    assert first == second


def test_a_job_in_the_foreground_of_a_terminal_ends_with_it(agent: Agent) -> None:
    script = "set -m; sh -c 'trap \"\" HUP; echo $$; exec sleep 1000'"
    done = agent.exec(["sh", "-c", script], flags=g.TERMINAL | g.STDIN)
    done.until(lambda: done.output[1].endswith(b"\r\n"))
    done.connection.reset()
    wait_until_gone(agent, int(done.output[1].split()[-1]))


# --- files ---


def read_file(agent: Agent, path: str, cap: int = 2**64 - 1) -> tuple[int, bytes]:
    connection = agent.dial()
    connection.send(frame(g.READ_FILE, string(path) + struct.pack("<Q", cap)))
    (size,) = struct.unpack("<Q", connection.expect(g.OK))
    data = bytearray()
    while True:
        kind, stream, payload = connection.next_frame()
        assert stream == 0
        if kind == g.END:
            assert connection.wait_end() == "shut"
            return size, bytes(data)
        assert kind == g.DATA
        data += payload


def file_error(agent: Agent, request: bytes) -> tuple[int, int]:
    connection = agent.dial()
    connection.send(request)
    number, _, value = connection.error()
    assert connection.wait_end() == "shut"
    return number, value


def read_request(path: str, cap: int = 2**64 - 1) -> bytes:
    return frame(g.READ_FILE, string(path) + struct.pack("<Q", cap))


def test_files_of_any_size_are_read(agent: Agent, tmp_path: Path) -> None:
    for size in (0, 1, 32_716, 5_000_000):
        data = os.urandom(size)
        (tmp_path / "file").write_bytes(data)
        assert read_file(agent, "file") == (size, data)
        assert read_file(agent, str(tmp_path / "file"), size) == (size, data)


def test_a_cap_is_an_error_with_the_size(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    assert file_error(agent, read_request("file", 999)) == (errno.EFBIG, 1000)


def test_a_cap_holds_for_files_that_do_not_tell_their_size(agent: Agent) -> None:
    assert len(read_file(agent, "/proc/self/status", 1 << 20)[1]) > 100
    connection = agent.dial()
    connection.send(read_request("/proc/self/status", 10))
    connection.expect(g.OK)
    number, _, value = connection.error()
    assert number == errno.EFBIG
    assert value > 10


def test_a_cap_holds_for_a_device_without_end(agent: Agent) -> None:
    connection = agent.dial()
    connection.send(read_request("/dev/zero", 100_000))
    connection.expect(g.OK)
    kinds = []
    while connection.ended is None or connection.frames:
        kinds.append(connection.next_frame()[0])
        if kinds[-1] == g.ERROR:
            break
    assert set(kinds) == {g.DATA, g.ERROR}


def test_what_is_no_file_is_not_read(agent: Agent, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert file_error(agent, read_request("missing"))[0] == errno.ENOENT
    assert file_error(agent, read_request("/"))[0] == errno.EISDIR
    assert file_error(agent, read_request("fifo"))[0] == errno.EINVAL


def test_a_written_file_appears_whole_with_its_mode(agent: Agent, tmp_path: Path) -> None:
    data = os.urandom(1_000_000)
    (tmp_path / "file").write_text("old")
    connection = agent.dial()
    connection.send(frame(g.WRITE_FILE, string("file") + u32(0o4751)))
    connection.expect(g.OK)
    for at in range(0, len(data), 65536):
        connection.send(frame(g.DATA, data[at : at + 65536]))
    ping(agent)
    assert (tmp_path / "file").read_text() == "old"
    connection.send(frame(g.END))
    connection.expect(g.OK)
    assert connection.wait_end() == "shut"
    assert (tmp_path / "file").read_bytes() == data
    assert (tmp_path / "file").stat().st_mode & 0o7777 == 0o4751
    assert len(list(tmp_path.iterdir())) == 1


def test_without_its_end_a_file_is_not_written(agent: Agent, tmp_path: Path) -> None:
    connection = agent.dial()
    connection.send(frame(g.WRITE_FILE, string("file") + u32(0o644)) + frame(g.DATA, b"half"))
    connection.expect(g.OK)
    connection.shut()
    assert connection.wait_end() == "reset"
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_an_error(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    for path, number in (
        ("no/such", errno.ENOENT),
        ("/etc/passwd/x", errno.ENOTDIR),
        ("directory/", errno.EISDIR),
        ("", errno.EISDIR),
    ):
        request = frame(g.WRITE_FILE, string(path) + u32(0o644))
        assert file_error(agent, request)[0] == number
    connection = agent.dial()
    connection.send(frame(g.WRITE_FILE, string("directory") + u32(0o644)) + frame(g.END))
    connection.expect(g.OK)
    assert connection.error()[0] == errno.EISDIR


# --- control, workload ---


def control(agent: Agent, kind: int, payload: bytes = b"") -> g.Connection:
    connection = agent.dial()
    connection.send(frame(kind, payload))
    return connection


def test_ping_tells_the_monotonic_clock(agent: Agent) -> None:
    assert ping(agent) < ping(agent)


def test_there_is_nothing_before_set_up(bare_agent: Agent) -> None:
    bare_agent.until(lambda: bare_agent.lifeline is not None)
    assert bare_agent.dial().wait_end() == "reset"


def test_the_workload_is_supervised(bare_agent: Agent, tmp_path: Path) -> None:
    script = "trap 'exit 7' TERM; touch started; while :; do sleep 0.05; done"
    bare_agent.set_up(workload=["sh", "-c", script], workdir=str(tmp_path))
    waiter = control(bare_agent, g.WORKLOAD_WAIT)
    run(bare_agent, "sh", "-c", "until [ -e started ]; do sleep 0.01; done")
    control(bare_agent, g.WORKLOAD_SIGNAL, struct.pack("<i", signal.SIGTERM)).expect(g.OK)
    for connection in (waiter, control(bare_agent, g.WORKLOAD_WAIT)):
        assert struct.unpack_from("<i", connection.expect(g.EXIT)) == (7,)
        assert connection.wait_end() == "shut"
    gone = control(bare_agent, g.WORKLOAD_SIGNAL, struct.pack("<i", signal.SIGTERM))
    assert gone.error()[0] == errno.ESRCH


def test_without_a_workload_there_is_none_to_wait_for(agent: Agent) -> None:
    assert control(agent, g.WORKLOAD_WAIT).error()[0] == errno.ESRCH


def test_a_workload_that_cannot_start_has_ended_with_127(bare_agent: Agent) -> None:
    bare_agent.set_up(workload=["/no/such/program"])
    end = control(bare_agent, g.WORKLOAD_WAIT).expect(g.EXIT)
    assert struct.unpack_from("<i", end) == (127,)


def test_shutdown_sends_the_stop_signal_and_ends(bare_agent: Agent, tmp_path: Path) -> None:
    script = "trap 'touch stopped; exit' INT; touch started; while :; do sleep 0.05; done"
    bare_agent.set_up(workload=["sh", "-c", script], workdir=str(tmp_path), stop_signal=2)
    run(bare_agent, "sh", "-c", "until [ -e started ]; do sleep 0.01; done")
    control(bare_agent, g.SHUTDOWN, u32(60_000)).expect(g.OK)
    assert bare_agent.process.wait(g.PATIENCE) == 0
    assert (tmp_path / "stopped").exists()


def test_after_its_grace_shutdown_waits_no_longer(bare_agent: Agent) -> None:
    bare_agent.set_up(workload=["sh", "-c", "trap '' TERM; while :; do sleep 1; done"])
    control(bare_agent, g.SHUTDOWN, u32(10)).expect(g.OK)
    assert bare_agent.process.wait(g.PATIENCE) == 0


def end_lifeline(agent: Agent) -> None:
    assert agent.lifeline is not None
    agent.lifeline.reset()


@pytest.mark.parametrize("end", [end_lifeline, lambda agent: agent.sock.close()])
def test_everything_ends_with_the_lifeline_or_the_carrier(
    agent: Agent, end: Callable[[Agent], None]
) -> None:
    done = agent.exec(["sleep", "1000"])
    pid = done.started()
    end(agent)
    assert agent.process.wait(g.PATIENCE) == 0
    wait_until_gone(agent, pid)


# --- many, and for long ---


def test_fifty_execs_at_once(agent: Agent) -> None:
    execs = [agent.exec(["sh", "-c", f"cat; echo {n}"], flags=g.STDIN) for n in range(50)]
    for n, done in enumerate(execs):
        done.started()
        done.write(b"%d " % n * 1000)
        done.end_stdin()
    for n, done in enumerate(execs):
        assert done.finish().returncode == 0
        assert done.output[1] == b"%d " % n * 1000 + b"%d\n" % n


def test_one_that_prints_for_ever_does_not_starve_others(agent: Agent) -> None:
    loud = agent.exec(["yes"], window=1 << 31)
    loud.until(lambda: len(loud.output[1]) > 1_000_000)
    for _ in range(20):
        assert run(agent, "echo", "x")[1] == b"x\n"
        loud.connection.frames.clear()
    loud.connection.reset()


def test_a_host_that_does_not_read_one_stream_does_not_hurt_others(agent: Agent) -> None:
    loud = agent.exec(["yes"], window=1 << 31)
    loud.connection.stop_reading()
    assert run(agent, "echo", "x")[1] == b"x\n"
    ping(agent)
    assert len(loud.connection.unparsed) + sum(len(f[2]) for f in loud.connection.frames) <= (
        g.HOST_WINDOW
    )
    loud.connection.reset()


def test_a_host_that_only_asks_and_never_reads_makes_nothing_grow(agent: Agent) -> None:
    done = agent.exec(["sleep", "1000"])
    done.started()
    done.connection.stop_reading()
    done.connection.told = done.connection.consumed
    ask = frame(g.SIGNAL, struct.pack("<IiI", 1, 0, 0))
    sent = 0
    while done.connection._credit() > 100 * len(ask) and sent < 200_000:
        done.connection.send(ask * 100)
        sent += 100
        ping(agent)
    # It took what its answers had room for, kept a window's worth, and then gave no more credit.
    assert sent < 200_000
    ping(agent)
    done.connection.reset()


def test_nothing_leaks_over_many_execs(agent: Agent) -> None:
    run(agent, "true")
    ping(agent)
    before = open_fds(agent)
    for _ in range(100):
        run(agent, "true")
        agent.exec(["sleep", "1000"], flags=g.STDIN).connection.reset()
        connection = agent.dial()
        connection.send(g.exec_request(["no-such-program"]))
        connection.error()
    ping(agent)
    run(agent, "sleep", "0.05")
    assert open_fds(agent) == before
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text()
    assert not children


def test_connections_beyond_the_bound_are_refused(agent: Agent) -> None:
    connections = [agent.dial() for _ in range(1024)]
    # One is the lifeline's.
    assert connections[-1].wait_end() == "reset"
    assert connections[-2].ended is None
    for connection in connections[:-1]:
        connection.reset()
    ping(agent)


def test_arguments_may_be_empty(agent: Agent) -> None:
    assert run(agent, "printf", "%s|", "", "a b", "c")[1] == b"|a b|c|"


def test_arguments_are_bytes(agent: Agent) -> None:
    done = agent.exec([b"printf", b"%s", b"\xff\xfe \n"])
    assert done.finish().returncode == 0
    assert done.output[1] == b"\xff\xfe \n"


def test_a_large_request_is_taken(agent: Agent) -> None:
    environment = [f"V{n}={'x' * 1000}" for n in range(1000)]
    assert run(agent, "sh", "-c", "env | grep -c ^V", env=environment)[1] == b"1000\n"
