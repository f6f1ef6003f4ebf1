"""A plain client of the guest agent for its tests: packets and frames by hand, no library code."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

from trio_supermachine.guest import init_binary

PACKET = struct.Struct("<QQIIIHHIII")
REQUEST, RESPONSE, RST, SHUT, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
OP_FREEZE, OP_FROZEN, OP_THAW, OP_RESET = range(16, 20)
VERSION = 4
HELLO, SETUP, READY, ERROR, OK, RESTORE = range(1, 7)
EXEC, STARTED, DATA, END, WINDOW, CLOSE, SIGNAL, ACK, RESIZE, EXIT = range(8, 18)
READ_FILE, WRITE_FILE = 24, 25
PING, SHUTDOWN, WORKLOAD_SIGNAL, WORKLOAD_WAIT, SET_CLOCK, FREEZE, THAW, AWAIT_LISTENER = range(
    32, 40
)
CONNECT, OPEN = 40, 48
TCP, UDP = 6, 17
TERMINAL, STDIN, EXACT_ENV, NULL_STDOUT, NULL_STDERR, MERGE_STDERR = 1, 2, 4, 8, 16, 32
HOST_WINDOW = 262144
AGENT_PORT, LIFELINE_PORT = 1028, 1029
PATIENCE = 120.0  # seconds until a silent agent is given up: for hangs, never a claim


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u32(len(data)) + data


def strings(items: Sequence[str | bytes]) -> bytes:
    return u32(len(items)) + b"".join(string(item) for item in items)


def frame(kind: int, payload: bytes = b"", stream: int = 0) -> bytes:
    return struct.pack("<IBBH", len(payload), kind, stream, 0) + payload


def packet(
    op: int,
    port: int,
    payload: bytes = b"",
    *,
    flags: int = 0,
    to: int = AGENT_PORT,
    src_cid: int = 2,
    dst_cid: int = 3,
    kind: int = 1,
    window: int = HOST_WINDOW,
    consumed: int = 0,
) -> bytes:
    header = (src_cid, dst_cid, port, to, len(payload), kind, op, flags, window, consumed)
    return PACKET.pack(*header) + payload


def exec_request(
    *chain: Sequence[str | bytes],
    flags: int = 0,
    timeout_ms: int = 0,
    size: tuple[int, int] = (0, 0),
    window: int = 1 << 20,
    cwd: str = "",
    user: str = "",
    env: Sequence[str] = (),
    files: Sequence[tuple[str, int, int]] = (),
) -> bytes:
    payload = struct.pack("<IIHHI", flags, timeout_ms, *size, window)
    payload += string(cwd) + string(user) + strings(env)
    payload += u32(len(chain)) + b"".join(strings(argv) for argv in chain)
    payload += u32(len(files))
    for path, mode, length in files:
        payload += string(path) + struct.pack("<IQ", mode, length)
    return frame(EXEC, payload)


def restore_payload(
    seed: bytes = bytes(32),
    version: int = VERSION,
    machine_id: str = "0123456789abcdef" * 2,
    boot_id: str = "01234567-89ab-cdef-0123-456789abcdef",
    flags: int = 0,
) -> bytes:
    payload = struct.pack("<IQ", version, time.time_ns()) + string("") + string(seed)
    return payload + string(machine_id) + string(boot_id) + struct.pack("<I", flags)


@attrs.frozen
class Exit:
    returncode: int
    flags: int
    duration_us: int
    peak_rss_kib: int


class Connection:
    """One stream of the carrier, and the frames on it."""

    def __init__(self, agent: Agent, port: int, to: int) -> None:
        self.agent, self.port, self.to = agent, port, to
        self.open = False
        self.ended: str | None = None  # "shut" or "reset"
        self.sent = self.consumed = self.told = self.peer_window = self.peer_consumed = 0
        self.unparsed = bytearray()
        self.frames: deque[tuple[int, int, bytes]] = deque()
        self.reading = True

    def send(self, data: bytes) -> None:
        """Send bytes as the peer's credit allows."""
        view = memoryview(data)
        while view:
            self.agent.until(lambda: self.ended is not None or self._credit() > 0)
            if self.ended is not None:
                raise BrokenPipeError(self.ended)
            part = view[: min(self._credit(), 65536)]
            self.sent += len(part)
            self.agent.send(self._packet(RW, bytes(part)))
            view = view[len(part) :]

    def _credit(self) -> int:
        return self.peer_window - (self.sent - self.peer_consumed) if self.open else 0

    def _packet(self, op: int, payload: bytes = b"", flags: int = 0) -> bytes:
        self.told = self.consumed
        consumed = self.consumed & 0xFFFFFFFF
        return packet(op, self.port, payload, flags=flags, to=self.to, consumed=consumed)

    def next_frame(self) -> tuple[int, int, bytes]:
        """The next frame: type, stream, payload. ``EOFError`` at the end."""
        self.agent.until(lambda: bool(self.frames) or self.ended is not None)
        if not self.frames:
            raise EOFError(self.ended)
        return self.frames.popleft()

    def expect(self, kind: int) -> bytes:
        got, _, payload = self.next_frame()
        assert got == kind, (got, payload)
        return payload

    def error(self) -> tuple[int, str, int]:
        payload = self.expect(ERROR)
        errno, size = struct.unpack_from("<iI", payload)
        (value,) = struct.unpack_from("<Q", payload, 8 + size)
        return errno, payload[8 : 8 + size].decode(), value

    def wait_end(self) -> str:
        self.agent.until(lambda: self.ended is not None)
        assert self.ended is not None
        return self.ended

    def shut(self, flags: int = 3) -> None:
        self.agent.send(self._packet(SHUT, flags=flags))

    def reset(self) -> None:
        self.agent.send(self._packet(RST))
        self.agent.forget(self, "reset")

    def stop_reading(self) -> None:
        """Give no more vsock credit: what comes counts as received and unread."""
        self.reading = False

    def receive(self, data: bytes) -> None:
        self.unparsed += data
        if self.reading:
            self.consumed += len(data)
        while len(self.unparsed) >= 8:
            length, kind, stream, zero = struct.unpack_from("<IBBH", self.unparsed)
            assert zero == 0
            assert length <= (65536 if kind == DATA else 2 << 20)
            if len(self.unparsed) < 8 + length:
                break
            self.frames.append((kind, stream, bytes(self.unparsed[8 : 8 + length])))
            del self.unparsed[: 8 + length]
        if self.consumed - self.told >= HOST_WINDOW // 2:
            self.agent.send(self._packet(CREDIT_UPDATE))


class Agent:
    """The real program as an ordinary process, at the other end of a socket pair."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.sock, self.process = sock, process
        self.connections: dict[tuple[int, int], Connection] = {}
        self.resets = 0  # RST packets for connections that this side does not know
        self.buffer = bytearray()
        self.next_port = 5000
        self.lifeline: Connection | None = None
        self.lifelines = 0  # how many were dialled
        self.refusing = False  # to dial anew
        self.frozen = False
        self.held: bytearray | None = (
            None  # what is to be sent after a silence; None: there is none
        )
        self.ended = False

    def send(self, data: bytes) -> None:
        """Send raw packets, taking in what comes meanwhile."""
        if self.held is not None:
            self.held += data
            return
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                self.take(0.01)
            except BrokenPipeError:
                return  # it has ended; what it sent before is still to be taken

    def take(self, timeout: float) -> None:
        self.sock.settimeout(timeout)
        try:
            data = self.sock.recv(1 << 20)
        except TimeoutError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self.ended = True
            raise EOFError("the agent has ended")
        self.buffer += data
        at = 0
        while len(self.buffer) - at >= PACKET.size:
            header = PACKET.unpack_from(self.buffer, at)
            size = header[4]
            assert size <= 32724
            if len(self.buffer) - at < PACKET.size + size:
                break
            self._packet(header, bytes(self.buffer[at + PACKET.size : at + PACKET.size + size]))
            at += PACKET.size + size
        del self.buffer[:at]

    def until(self, done: Callable[[], bool]) -> None:
        give_up = time.monotonic() + PATIENCE
        while not done():
            self.take(PATIENCE)
            assert time.monotonic() < give_up, "the agent is silent"

    def _packet(self, header: tuple[int, ...], payload: bytes) -> None:
        src_cid, dst_cid, src_port, dst_port, _, kind, op, flags, window, consumed = header
        assert (src_cid, dst_cid, kind) == (3, 2, 1)
        assert not self.frozen
        if op == OP_FROZEN:
            assert header[2:5] == (0, 0, 0)
            self.frozen = True
            return
        if op == REQUEST:
            assert dst_port == LIFELINE_PORT
            self.lifelines += 1
            if self.refusing:
                self.send(packet(RST, dst_port, to=src_port))
                return
            self.lifeline = self._add(dst_port, src_port)
            self.lifeline.peer_window = window
            self.lifeline.open = True
            self.send(self.lifeline._packet(RESPONSE))
            return
        connection = self.connections.get((dst_port, src_port))
        if connection is None:
            self.resets += op == RST
            return
        connection.peer_window, connection.peer_consumed = window, consumed
        in_flight = connection.sent - connection.peer_consumed
        assert 0 <= in_flight <= connection.sent
        if op == RESPONSE:
            connection.open = True
        elif op == RW:
            connection.receive(payload)
        elif op == SHUT and flags == 2:
            return  # an end of sending, which frames have no use for
        elif op == SHUT:
            assert flags == 3
            self.send(connection._packet(RST))
            self.forget(connection, "shut")
        elif op == RST:
            self.forget(connection, "reset")

    def _add(self, port: int, to: int) -> Connection:
        connection = self.connections[port, to] = Connection(self, port, to)
        return connection

    def forget(self, connection: Connection, why: str) -> None:
        connection.ended = why
        self.connections.pop((connection.port, connection.to), None)

    def dial(self) -> Connection:
        self.next_port += 1
        connection = self._add(self.next_port, AGENT_PORT)
        self.send(connection._packet(REQUEST))
        return connection

    def set_up(
        self,
        *,
        env: Sequence[str] = (),
        workdir: str = "/",
        user: str = "",
        workload: Sequence[str] = (),
        stop_signal: int = 15,
    ) -> None:
        lifeline = self.greeted(0)
        payload = struct.pack("<IQ", VERSION, time.time_ns()) + string("tester")
        payload += string(os.urandom(32)) + u32(0) + strings(env) + string(workdir) + string(user)
        payload += strings(workload) + struct.pack("<i", stop_signal) + string("0" * 32)
        lifeline.send(frame(SETUP, payload))
        lifeline.expect(READY)

    def greeted(self, kind: int) -> Connection:
        """The lifeline, opened anew or for the first time, when the agent has said this on it."""
        self.until(lambda: self.lifeline is not None and self.lifeline.ended is None)
        assert self.lifeline is not None
        assert struct.unpack_from("<II", self.lifeline.expect(HELLO)) == (VERSION, kind)
        return self.lifeline

    def freeze(self) -> None:
        """Have the agent say no more."""
        self.send(packet(OP_FREEZE, 0, to=0))
        self.held = bytearray()
        self.until(lambda: self.frozen)

    def thaw(self) -> None:
        held, self.held = self.held or b"", None
        self.frozen = False
        self.send(packet(OP_THAW, 0, to=0) + held)

    def restore(self, seed: bytes = bytes(32)) -> None:
        """As if this were a copy of the machine that was frozen."""
        self.frozen, self.held = False, None
        for connection in list(self.connections.values()):
            self.forget(connection, "reset")
        self.send(packet(OP_RESET, 0, to=0))
        self.renew(seed)

    def renew(self, seed: bytes = bytes(32)) -> None:
        """Answer a lifeline opened anew."""
        lifeline = self.greeted(1)
        lifeline.send(frame(RESTORE, restore_payload(seed)))
        lifeline.expect(READY)

    def exec(self, *chain: Sequence[str | bytes], **options: object) -> Exec:
        connection = self.dial()
        connection.send(exec_request(*chain, **options))  # type: ignore[arg-type]
        return Exec(connection)


class Exec:
    """What a started exec says, sorted by stream."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.output = {1: bytearray(), 2: bytearray()}
        self.ends: set[int] = set()
        self.pid: int | None = None
        self.exit: Exit | None = None
        self.credit = 0
        self.stdin_closed = False
        self.acks: dict[int, int] = {}

    def step(self) -> None:
        kind, stream, payload = self.connection.next_frame()
        if kind == STARTED:
            (self.pid,) = struct.unpack("<I", payload)
        elif kind == DATA:
            assert stream not in self.ends
            self.output[stream] += payload
        elif kind == END:
            self.ends.add(stream)
        elif kind == WINDOW:
            assert stream == 0
            self.credit += struct.unpack("<I", payload)[0]
        elif kind == CLOSE:
            assert stream == 0
            self.stdin_closed = True
        elif kind == ACK:
            sequence, errno = struct.unpack("<Ii", payload)
            self.acks[sequence] = errno
        elif kind == EXIT:
            assert self.exit is None
            self.exit = Exit(*struct.unpack("<iIQQ", payload))
        else:
            raise AssertionError(f"unexpected frame {kind}: {payload!r}")

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.step()

    def started(self) -> int:
        self.until(lambda: self.pid is not None)
        assert self.pid is not None
        return self.pid

    def finish(self) -> Exit:
        """Read to the end of the connection."""
        while True:
            try:
                self.step()
            except EOFError:
                assert self.connection.ended == "shut"
                assert self.exit is not None
                return self.exit

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self.stdin_closed:
            self.until(lambda: self.credit > 0 or self.stdin_closed)
            part = bytes(view[: min(self.credit, 65536)])
            self.credit -= len(part)
            self.connection.send(frame(DATA, part))
            view = view[len(part) :]

    def end_stdin(self) -> None:
        self.connection.send(frame(END))

    def grant(self, stream: int, size: int) -> None:
        self.connection.send(frame(WINDOW, u32(size), stream))

    def close(self, stream: int) -> None:
        self.connection.send(frame(CLOSE, b"", stream))

    def signal(self, number: int, *, group: bool = False, sequence: int = 1) -> int:
        self.connection.send(frame(SIGNAL, struct.pack("<IiI", sequence, number, group)))
        self.until(lambda: sequence in self.acks)
        return self.acks.pop(sequence)


def agent_program() -> Path:
    """The agent; ``GUEST_AGENT`` names another build of it, such as one with sanitizers."""
    return Path(os.environ.get("GUEST_AGENT") or init_binary())


@contextmanager
def start_agent(*arguments: str, within: Sequence[str] = ()) -> Iterator[Agent]:
    """The agent before its set-up, started by this command. It has ended when the block is left."""
    ours, theirs = socket.socketpair()
    with ours:
        process = subprocess.Popen(
            [*within, agent_program(), "--agent-on-fd", str(theirs.fileno()), *arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        try:
            yield Agent(ours, process)
        finally:
            ours.close()
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()
                process.wait()
