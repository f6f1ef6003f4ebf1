"""Whatever a host sends, the agent goes on, resets that connection, or ends cleanly."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..support import guest_client as g
from ..support.guest_client import Agent, frame, packet, start_agent, string, strings, u32

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it is locked into a root of its own")

fuzz = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MAX_RSS_KIB = 16 * 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the agent is locked in, for it runs what it is told to."""
    tmp_path.chmod(0o755)
    for name in ("dev", "etc", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "dev/null").touch()
    (tmp_path / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (tmp_path / "bin/busybox").chmod(0o755)
    return tmp_path


@contextmanager
def unbreakable(root: Path, *, may_end: bool = False) -> Iterator[Agent]:
    """An agent that answers after the block as before, and has not grown."""
    with start_agent("--root", str(root)) as agent:
        agent.set_up()
        try:
            yield agent
            connection = agent.dial()
            connection.send(frame(g.PING))
            connection.expect(g.OK)
            status = Path(f"/proc/{agent.process.pid}/status").read_text()
            (rss,) = (line.split()[1] for line in status.splitlines() if "VmRSS" in line)
            assert int(rss) < MAX_RSS_KIB
        except (EOFError, BrokenPipeError, ConnectionResetError):
            assert may_end
        agent.sock.close()
        assert agent.process.wait(g.PATIENCE) == 0


@fuzz
@given(data=st.binary(max_size=4096))
def test_random_bytes_end_it_cleanly(root: Path, data: bytes) -> None:
    with unbreakable(root, may_end=True) as agent:
        agent.send(data)


quiet_packets = st.builds(packet, op=st.integers(16, 20), port=st.just(0), to=st.just(0))
packets = st.builds(
    packet,
    op=st.integers(1, 7),
    port=st.integers(1, 4),
    payload=st.binary(max_size=200) | st.just(bytes(65536)),
    flags=st.integers(0, 3),
    to=st.sampled_from([g.AGENT_PORT, g.AGENT_PORT, 7]),
    window=st.sampled_from([0, 1, 100, g.HOST_WINDOW, 2**32 - 1]),
    consumed=st.sampled_from([0, 1, 100, 2**31, 2**32 - 1]),
)


@fuzz
@given(sent=st.lists(packets, max_size=40))
def test_sound_packets_in_any_order_concern_their_connection_alone(
    root: Path, sent: list[bytes]
) -> None:
    with unbreakable(root) as agent:
        agent.send(b"".join(sent))


@fuzz
@given(sent=st.lists(packets | quiet_packets, max_size=40), after=st.binary(max_size=100))
def test_the_operations_of_silence_in_any_order_end_it_cleanly(
    root: Path, sent: list[bytes], after: bytes
) -> None:
    # The test's client would be surprised by what only a copy does: it does not look.
    with start_agent("--root", str(root)) as agent:
        agent.set_up()
        agent.sock.settimeout(g.PATIENCE)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            agent.sock.sendall(b"".join(sent) + after)
        agent.sock.close()
        assert agent.process.wait(g.PATIENCE) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        packet(g.RW, 1, src_cid=3),
        packet(g.RW, 1, dst_cid=2),
        packet(g.RW, 1, kind=2),
        packet(0, 1),
        packet(8, 1),
        packet(g.RW, 1, bytes(65537)),
    ],
)
def test_a_packet_that_cannot_be_ends_the_machine(root: Path, wrong: bytes) -> None:
    with start_agent("--root", str(root)) as agent:
        agent.set_up()
        agent.send(wrong)
        assert agent.process.wait(g.PATIENCE) == 0


def test_a_thousand_packets_for_nobody_get_as_many_resets(root: Path) -> None:
    with unbreakable(root) as agent:
        agent.send(b"".join(packet(g.RW, port, b"x") for port in range(10_000, 11_000)))
        agent.until(lambda: agent.resets == 1000)


paths = st.sampled_from(["f", "dev/null", "etc", "no/where", "", ".", "f/g", "bin/busybox"])
programs = st.sampled_from(
    [["busybox", "true"], ["busybox", "cat"], ["busybox", "yes"], ["no"], [""], ["busybox", "env"]]
)
texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=10)
execs = st.builds(
    lambda *chain, **options: g.exec_request(*chain, **options),
    programs,
    flags=st.integers(0, 127),
    timeout_ms=st.sampled_from([0, 1]),
    window=st.sampled_from([0, 1, 1000, 2**32 - 1]),
    cwd=paths,
    user=texts,
    env=st.lists(texts, max_size=3),
    files=st.lists(st.tuples(paths, st.integers(0, 2**32 - 1), st.integers(0, 5)), max_size=2),
)
small = st.binary(max_size=20)
requests = (
    execs
    | st.builds(
        lambda p, n: frame(g.READ_FILE, string(p) + struct.pack("<Q", n)), paths, st.integers(0, 9)
    )
    | st.builds(
        lambda p, n: frame(g.WRITE_FILE, string(p) + u32(n)), paths, st.integers(0, 2**32 - 1)
    )
    | st.just(frame(g.PING))
    | st.builds(
        frame,
        st.sampled_from(
            [
                *(g.WORKLOAD_SIGNAL, g.WORKLOAD_WAIT, g.SET_CLOCK, g.FREEZE, g.THAW),
                *(g.AWAIT_LISTENER, g.CONNECT),
            ]
        ),
        small,
    )
)
followers = (
    st.builds(frame, st.just(g.DATA), small | st.just(bytes(65536)), st.integers(0, 4))
    | st.builds(frame, st.sampled_from([g.END, g.CLOSE]), st.just(b""), st.integers(0, 4))
    | st.builds(
        lambda n, s: frame(g.WINDOW, u32(n), s), st.integers(0, 2**32 - 1), st.integers(0, 3)
    )
    | st.builds(lambda s: frame(g.SIGNAL, struct.pack("<IiI", 1, s, 1)), st.integers(-1, 70))
    | st.builds(frame, st.integers(0, 31), small, st.integers(0, 255))
)


def conversation(agent: Agent, data: bytes) -> None:
    connection = agent.dial()
    try:
        connection.send(data)
    except BrokenPipeError:
        return
    if connection.ended is None:
        connection.reset()


@fuzz
@given(requests=st.lists(st.tuples(requests, st.lists(followers, max_size=8)), max_size=6))
def test_frames_in_any_order_concern_their_connection_alone(
    root: Path, requests: list[tuple[bytes, list[bytes]]]
) -> None:
    with unbreakable(root) as agent:
        for request, after in requests:
            conversation(agent, request + b"".join(after))


@fuzz
@given(request=requests, at=st.integers(0, 200), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_request_concerns_its_connection_alone(
    root: Path, request: bytes, at: int, value: int, cut: bool
) -> None:
    at %= len(request)
    rest = b"" if cut else request[at + 1 :]
    damaged = request[:at] + bytes([value]) + rest
    # A request to shut down is obeyed.
    with unbreakable(root, may_end=damaged[4:5] == bytes([g.SHUTDOWN])) as agent:
        conversation(agent, damaged)


@pytest.mark.parametrize(
    "request_",
    [
        frame(g.EXEC, b""),
        frame(g.PING, b"x"),
        frame(g.DATA, b"x"),
        frame(g.HELLO),
        frame(g.SETUP),
        frame(200),
        struct.pack("<IBBH", (2 << 20) + 1, g.EXEC, 0, 0),
        struct.pack("<IBBH", 0, g.PING, 0, 1),
        g.exec_request(["busybox", "true"], flags=64),
        g.exec_request([]),
        g.exec_request(),
        g.exec_request(["busybox", "nul\0nul"]),
        frame(g.EXEC, struct.pack("<IIHHI", 0, 0, 0, 0, 0) + strings(["", ""])[4:] + u32(65537)),
        frame(g.PING) + frame(g.PING)[:4] + struct.pack("<BBH", g.DATA, 0, 9),
        frame(g.WORKLOAD_SIGNAL, u32(2**31)),
        frame(g.RESTORE, g.restore_payload()),
        frame(g.FREEZE, b"x"),
        frame(g.THAW, b"x"),
        frame(g.AWAIT_LISTENER),
        frame(g.AWAIT_LISTENER, u32(0) + u32(65536)),
        frame(g.CONNECT),
        frame(g.CONNECT, u32(g.TCP) + u32(65536)),
        frame(g.CONNECT, u32(1) + u32(80)),
        frame(g.CONNECT, u32(g.TCP) + u32(0) + b"x"),
        frame(g.OPEN, bytes(24)),
    ],
)
def test_what_breaks_the_protocol_ends_the_connection(root: Path, request_: bytes) -> None:
    with unbreakable(root) as agent:
        connection = agent.dial()
        connection.send(request_)
        connection.wait_end()


relayed: st.SearchStrategy[dict[str, int]] = st.builds(
    dict,
    op=st.sampled_from([g.RW, g.RW, g.RW, g.SHUT, g.RST, g.CREDIT_UPDATE, g.CREDIT_REQUEST]),
    size=st.integers(0, 200) | st.just(65536),
    flags=st.sampled_from([1, 2, 2, 3]),
    window=st.sampled_from([0, 1, 100, g.HOST_WINDOW, 2**32 - 1]),
    consumed=st.sampled_from([0, 1, 16, 2**31, 2**32 - 1]),
)


def relayed_packets(port: int, sent: list[dict[str, int]]) -> bytes:
    return b"".join(
        packet(
            port=port,
            payload=bytes(fields["size"]),
            **{k: v for k, v in fields.items() if k != "size"},
        )
        for fields in sent
    )


@fuzz
@given(
    before=st.lists(relayed, max_size=4),
    after=st.lists(relayed, max_size=10),
    program=st.sampled_from(["waits", "talks", "ends", "resets"]),
)
def test_packets_in_any_order_concern_their_relay_alone(
    root: Path, before: list[dict[str, int]], after: list[dict[str, int]], program: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, unbreakable(root) as agent:
        fds = len(os.listdir(f"/proc/{agent.process.pid}/fd"))
        connection = agent.dial()
        connection.send(frame(g.CONNECT, u32(g.TCP) + u32(listener.getsockname()[1])))
        agent.forget(connection, "what follows is not the client's")
        agent.send(relayed_packets(connection.port, before))
        taken, _ = listener.accept()
        with taken:
            if program == "talks":
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    taken.send(bytes(100_000), socket.MSG_DONTWAIT)
            elif program == "ends":
                with contextlib.suppress(OSError):  # it was reset before
                    taken.shutdown(socket.SHUT_WR)
            elif program == "resets":
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                taken.close()
            agent.send(relayed_packets(connection.port, after))
        agent.send(packet(g.RST, connection.port))
        while len(os.listdir(f"/proc/{agent.process.pid}/fd")) != fds:
            agent.take(0.01)


def test_data_in_one_byte_packets_is_the_same(root: Path) -> None:
    with unbreakable(root) as agent:
        connection = agent.dial()
        for byte in g.exec_request(["busybox", "echo", "slow"]):
            connection.send(bytes([byte]))
        done = g.Exec(connection)
        assert done.finish().returncode == 0
        assert done.output[1] == b"slow\n"
