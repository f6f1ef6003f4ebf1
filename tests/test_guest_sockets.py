"""The agent's other carrier, a socket for each connection, by unix sockets in place of AF_VSOCK."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from . import guest_client as g
from .guest_client import exec_request, frame, string, strings, u32


class Agent:
    def __init__(self, directory: Path, process: subprocess.Popen[bytes], lifeline: socket.socket):
        self.directory, self.process, self.lifeline = directory, process, lifeline

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
                answers = frames(lifeline)
                assert next(answers)[0] == g.HELLO
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
                assert next(answers)[0] == g.READY
                yield Agent(tmp_path, process, lifeline)
                answers.close()  # type: ignore[attr-defined]
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
        # What the program had written by then comes before its streams end.
        connection.sendall(frame(g.WINDOW, u32(1 << 30), 1))
        (end,) = [payload for kind, _, payload in answers if kind == g.EXIT]
    assert struct.unpack_from("<i", end) == (-signal.SIGKILL,)


def test_many_sockets_at_once(agent: Agent) -> None:
    connections = [agent.dial() for _ in range(100)]
    for n, connection in enumerate(connections):
        connection.sendall(exec_request(["echo", str(n)]))
    for n, connection in enumerate(connections):
        with connection:
            output = [payload for kind, _, payload in frames(connection) if kind == g.DATA]
            assert output == [b"%d\n" % n]
