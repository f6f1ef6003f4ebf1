"""An exec's streams and terminals in the agent, and many of them at once."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from pathlib import Path

import pytest

from ..support import guest_client as g
from ..support.guest_client import Agent, frame
from ..support.guest_fixtures import (
    agent,
    bare_agent,
    open_fds,
    ping,
    run,
    wait_until_gone,
    wait_until_idle,
)

__all__ = ["agent", "bare_agent"]  # fixtures

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


@pytest.mark.parametrize("left", range(10))
def test_credit_that_is_too_small_for_a_frame_is_waited_for_like_none(
    agent: Agent, tmp_path: Path, left: int
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    path = g.string(str(tmp_path / "file"))
    window = 16 + left  # the first answer, OK, and so many bytes of what follows it
    connection = agent._add(6000, g.AGENT_PORT)
    agent.send(g.packet(g.REQUEST, 6000, window=window))
    request = frame(g.READ_FILE, path + struct.pack("<Q", 100))
    connection.sent = len(request)
    agent.send(g.packet(g.RW, 6000, request, window=window))
    assert connection.expect(g.OK) == struct.pack("<Q", len(b"content"))
    wait_until_idle(agent)
    agent.send(g.packet(g.CREDIT_UPDATE, 6000))
    read = b""
    while (following := connection.next_frame())[0] == g.DATA:
        read += following[2]
    assert (following[0], read) == (g.END, b"content")


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
    connections = [agent.dial() for _ in range(4096)]
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
