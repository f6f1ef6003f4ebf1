"""The agent's other carrier, a socket for each connection, by unix sockets in place of AF_VSOCK."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from ..support import guest_client as g
from ..support.guest_client import exec_request, frame, string, strings, u32


class Agent:
    def __init__(
        self,
        directory: Path,
        process: subprocess.Popen[bytes],
        listener: socket.socket,
        lifeline: socket.socket,
    ) -> None:
        self.directory, self.process = directory, process
        self.listener, self.lifeline = listener, lifeline

    def dial(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(g.PATIENCE)
        connection.connect(str(self.directory / str(g.AGENT_PORT)))
        return connection

    def ask(self, request: bytes) -> list[tuple[int, int, bytes]]:
        """All frames that answer a request."""
        with self.dial() as connection:
            connection.sendall(request)
            return list(frames(connection))


def frames(connection: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    with closing(connection.makefile("rb")) as file:
        while header := file.read(8):
            length, kind, stream, _ = struct.unpack("<IBBH", header)
            yield kind, stream, file.read(length)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(g.PATIENCE)
        listener.bind(str(tmp_path / str(g.LIFELINE_PORT)))
        listener.listen()
        process = subprocess.Popen([g.agent_program(), "--agent-on-sockets", str(tmp_path)])
        try:
            lifeline, _ = listener.accept()
            with lifeline:
                lifeline.settimeout(g.PATIENCE)
                length, kind = struct.unpack_from("<IB", exactly(lifeline, 8))
                assert kind == g.HELLO
                exactly(lifeline, length)
                setup = struct.pack("<IQ", g.VERSION, time.time_ns()) + string("x")
                setup += (
                    string(bytes(32))
                    + u32(0)
                    + strings([])
                    + string("/")
                    + string("")
                    + strings([])
                    + u32(15)
                )
                setup += string("0" * 32)
                lifeline.sendall(frame(g.SETUP, setup))
                assert exactly(lifeline, 8)[4] == g.READY
                yield Agent(tmp_path, process, listener, lifeline)
                listener.close()  # the agent dials anew, and is refused
            assert process.wait(g.PATIENCE) == 0
        finally:
            process.kill()
            process.wait()


def test_an_exec_runs_over_a_socket(agent: Agent) -> None:
    answers = agent.ask(exec_request(["sh", "-c", "echo out; echo err >&2; exit 3"]))
    data = {stream: payload for kind, stream, payload in answers if kind == g.DATA}
    assert data == {1: b"out\n", 2: b"err\n"}
    (end,) = [payload for kind, _, payload in answers if kind == g.EXIT]
    assert struct.unpack_from("<i", end) == (3,)


def test_much_output_arrives_whole_through_small_buffers(agent: Agent) -> None:
    answers = agent.ask(exec_request(["seq", "500000"], window=1 << 30))
    output = b"".join(payload for kind, _, payload in answers if kind == g.DATA)
    assert output == b"".join(b"%d\n" % n for n in range(1, 500_001))


def test_much_input_arrives_whole(agent: Agent, tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    with agent.dial() as connection:
        connection.sendall(frame(g.WRITE_FILE, string(str(tmp_path / "file")) + u32(0o644)))
        for at in range(0, len(data), 65536):
            connection.sendall(frame(g.DATA, data[at : at + 65536]))
        connection.sendall(frame(g.END))
        assert [kind for kind, _, _ in frames(connection)] == [g.OK, g.OK]
    assert (tmp_path / "file").read_bytes() == data


def test_what_was_sent_before_closing_counts(agent: Agent, tmp_path: Path) -> None:
    with agent.dial() as connection:
        request = frame(g.WRITE_FILE, string(str(tmp_path / "file")) + u32(0o644))
        connection.sendall(request + frame(g.DATA, b"x" * 65536) + frame(g.DATA, b"y"))
        connection.sendall(frame(g.END))
    agent.ask(frame(g.PING))
    assert (tmp_path / "file").stat().st_size == 65537


def test_closing_the_socket_kills_the_group(agent: Agent) -> None:
    with agent.dial() as connection:
        connection.sendall(exec_request(["sleep", "1000"]))
        answers = frames(connection)
        kind, _, payload = next(answers)
        assert kind == g.STARTED
        watch = os.pidfd_open(struct.unpack("<I", payload)[0])
        answers.close()  # type: ignore[attr-defined]
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    assert poll.poll(g.PATIENCE * 1000)
    os.close(watch)


def test_a_half_closed_socket_goes_on(agent: Agent) -> None:
    with agent.dial() as connection:
        connection.sendall(exec_request(["sh", "-c", "sleep 0.1; echo x"]))
        connection.shutdown(socket.SHUT_WR)
        assert g.EXIT in [kind for kind, _, _ in frames(connection)]


@pytest.mark.parametrize("lifeline_first", [True, False])
def test_a_copy_has_none_of_its_connections_but_listens(
    agent: Agent, tmp_path: Path, lifeline_first: bool
) -> None:
    fds = len(os.listdir(f"/proc/{agent.process.pid}/fd"))
    running, writing, half, flooding = (agent.dial() for _ in range(4))
    running.sendall(exec_request(["sleep", "1000"]))
    pid = struct.unpack("<I", exactly(running, 12)[8:])[0]
    writing.sendall(frame(g.WRITE_FILE, string(str(tmp_path / "half")) + u32(0o644)))
    assert exactly(writing, 16)[4] == g.OK
    half.sendall(frame(g.PING)[:5])
    flooding.sendall(exec_request(["yes"], window=1 << 30))
    exactly(flooding, 100_000)  # and the agent has more than the socket takes
    watch = os.pidfd_open(pid)
    others = [running, writing, half, flooding]
    for connection in [agent.lifeline, *others] if lifeline_first else [*others, agent.lifeline]:
        connection.close()
    renewed, _ = agent.listener.accept()
    with renewed:
        renewed.settimeout(g.PATIENCE)
        length, kind = struct.unpack_from("<IB", header := exactly(renewed, 8))
        assert kind == g.HELLO, header
        assert struct.unpack_from("<II", exactly(renewed, length)) == (g.VERSION, 1)
        renewed.sendall(frame(g.RESTORE, g.restore_payload()))
        assert exactly(renewed, 8)[4] == g.READY
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        assert poll.poll(g.PATIENCE * 1000)
        os.close(watch)
        assert [kind for kind, _, _ in agent.ask(frame(g.PING))] == [g.OK]
        assert not (tmp_path / "half").exists()
        while len(os.listdir(f"/proc/{agent.process.pid}/fd")) != fds:
            os.sched_yield()  # what it has shut down it closes a moment later
        agent.listener.close()


def exactly(connection: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        part = connection.recv(size - len(got))
        assert part, got
        got += part
    return got


def test_a_copy_that_nobody_answers_ends(agent: Agent) -> None:
    agent.lifeline.close()
    agent.listener.accept()[0].close()
    assert agent.process.wait(g.PATIENCE) == 0


def test_the_end_of_a_program_is_told_whole(agent: Agent) -> None:
    with agent.dial() as connection:
        connection.sendall(exec_request(["sleep", "0.1"]))
        exactly(connection, 12)  # STARTED
        ends = connection.recv(1000)
        while more := connection.recv(1000):
            ends += more
    kinds = []
    while ends:
        length, kind = struct.unpack_from("<IB", ends)
        kinds.append(kind)
        ends = ends[8 + length :]
    assert sorted(kinds) == [g.END, g.END, g.EXIT]


def test_frames_that_break_the_protocol_end_their_socket_alone(agent: Agent) -> None:
    assert agent.ask(frame(200)) == []
    assert [kind for kind, _, _ in agent.ask(frame(g.PING))] == [g.OK]


def test_signals_are_answered_while_output_is_not_read(agent: Agent) -> None:
    with agent.dial() as connection:
        connection.sendall(exec_request(["yes"], window=1000))
        connection.sendall(frame(g.SIGNAL, struct.pack("<IiI", 7, signal.SIGKILL, 1)))
        answers = frames(connection)
        while (answer := next(answers))[0] != g.ACK:
            assert answer[0] in (g.STARTED, g.DATA, g.EXIT)
        assert answer == (g.ACK, 0, struct.pack("<Ii", 7, 0))
        # What the program had written by then comes before its streams end. That may have been so
        # little that all is said already, and the agent gone.
        with suppress(BrokenPipeError):
            connection.sendall(frame(g.WINDOW, u32(1 << 30), 1))
        (end,) = [payload for kind, _, payload in answers if kind == g.EXIT]
    assert struct.unpack_from("<i", end) == (-signal.SIGKILL,)


def connect(agent: Agent, port: int) -> socket.socket:
    connection = agent.dial()
    connection.sendall(frame(g.CONNECT, u32(g.TCP) + u32(port)))
    return connection


def test_a_programs_connection_is_bytes_and_half_closes(agent: Agent) -> None:
    data = os.urandom(3_000_000)

    def give_back() -> None:
        program, _ = server.accept()
        with program, program.makefile("rb") as file:
            program.sendall(file.read())

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=give_back)
        thread.start()
        with connect(agent, port) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            assert exactly(connection, 16) == frame(g.OK, struct.pack("<Q", port))
            with connection.makefile("rb") as file:
                assert file.read() == data
        thread.join()


def test_a_host_that_leaves_without_an_end_resets_the_program(agent: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = connect(agent, server.getsockname()[1])
        program, _ = server.accept()
        program.settimeout(g.PATIENCE)
        with program:
            exactly(connection, 16)
            connection.close()
            with pytest.raises(ConnectionResetError):
                program.recv(1)


def test_a_program_that_resets_ends_its_socket(agent: Agent) -> None:
    fds = len(os.listdir(f"/proc/{agent.process.pid}/fd"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        with connect(agent, server.getsockname()[1]) as connection:
            program, _ = server.accept()
            program.send(b"last words")
            exactly(connection, 16)
            assert exactly(connection, 10) == b"last words"
            program.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            program.close()
            assert connection.recv(1) == b""
        while len(os.listdir(f"/proc/{agent.process.pid}/fd")) != fds:
            os.sched_yield()  # what it has shut down it closes a moment later


def test_a_port_that_nobody_listens_on_is_told(agent: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ((kind, _, payload),) = agent.ask(frame(g.CONNECT, u32(g.TCP) + u32(port)))
    assert (kind, struct.unpack_from("<i", payload)) == (g.ERROR, (errno.ECONNREFUSED,))


def test_many_sockets_at_once(agent: Agent) -> None:
    connections = [agent.dial() for _ in range(100)]
    for n, connection in enumerate(connections):
        connection.sendall(exec_request(["echo", str(n)]))
    for n, connection in enumerate(connections):
        with connection:
            output = [payload for kind, _, payload in frames(connection) if kind == g.DATA]
            assert output == [b"%d\n" % n]
