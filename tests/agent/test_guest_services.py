"""What else the agent does for a host: files, control, the workload."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..support import guest_client as g
from ..support.guest_client import Agent, frame, start_agent, string, u32
from ..support.guest_fixtures import agent, bare_agent, ping, run, wait_until_gone

__all__ = ["agent", "bare_agent"]  # fixtures

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


def test_what_runs_beside_a_host_is_not_frozen(agent: Agent) -> None:
    assert control(agent, g.FREEZE).error()[0] == errno.EOPNOTSUPP
    control(agent, g.THAW).expect(g.OK)


@pytest.fixture
def agent_alone() -> Iterator[Agent]:
    """An agent in a network of its own, where nothing listens yet."""
    if os.geteuid():
        pytest.skip("a network of its own needs root")
    with start_agent(within=["unshare", "--net"]) as agent:
        agent.set_up(env=[f"PATH={os.environ['PATH']}"])
        yield agent


LISTEN = """
import socket, sys
sockets = [socket.socket(getattr(socket, family)) for family in sys.argv[1::2]]
for sock, port in zip(sockets, sys.argv[2::2]):
    sock.bind(("::" if sock.family == socket.AF_INET6 else "0.0.0.0", int(port)))
    sock.listen()
print("up", flush=True)
sys.stdin.read()
"""


def listen(agent: Agent, *sockets: str) -> g.Exec:
    """Listen on these families and ports, the sockets made in this order."""
    done = agent.exec([sys.executable, "-c", LISTEN, *sockets], flags=g.STDIN)
    done.until(lambda: b"up" in done.output[1])
    return done


def first_listener(agent: Agent, timeout_ms: int) -> int:
    connection = control(agent, g.AWAIT_LISTENER, u32(timeout_ms) + u32(0))
    (port,) = struct.unpack("<Q", connection.expect(g.OK))
    assert connection.wait_end() == "shut"
    return int(port)


@pytest.mark.parametrize(
    ("sockets", "first"),
    [
        (["AF_INET", "8080", "AF_INET", "7070"], 8080),
        (["AF_INET6", "9090", "AF_INET", "1"], 9090),
        (["AF_INET", "65535", "AF_INET6", "80"], 65535),
    ],
)
def test_the_first_listener_is_the_socket_that_was_made_first(
    agent_alone: Agent, sockets: list[str], first: int
) -> None:
    assert first_listener(agent_alone, 0) == 0
    listen(agent_alone, *sockets)
    assert first_listener(agent_alone, 0) == first


def test_who_waits_for_a_listener_is_told_when_there_is_one(agent_alone: Agent) -> None:
    waiters = [control(agent_alone, g.AWAIT_LISTENER, u32(2**32 - 1) + u32(0)) for _ in range(3)]
    assert first_listener(agent_alone, 1) == 0
    waiters.pop().reset()
    listen(agent_alone, "AF_INET", "1234")
    for waiter in waiters:
        assert waiter.expect(g.OK) == struct.pack("<Q", 1234)


def test_the_trial_program_ends_at_once() -> None:
    assert subprocess.run([g.agent_program(), "--trial"]).returncode == 0


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
    agent.refusing = True
    agent.lifeline.reset()
    with pytest.raises(EOFError):
        agent.until(lambda: False)
    assert agent.lifelines == 2


@pytest.mark.parametrize("end", [end_lifeline, lambda agent: agent.sock.close()])
def test_everything_ends_with_the_lifeline_or_the_carrier(
    agent: Agent, end: Callable[[Agent], None]
) -> None:
    done = agent.exec(["sleep", "1000"])
    pid = done.started()
    end(agent)
    assert agent.process.wait(g.PATIENCE) == 0
    wait_until_gone(agent, pid)
