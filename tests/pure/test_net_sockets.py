"""The unix sockets of a VM lead where a connection's first bytes say, and are one user's alone."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import example, given
from hypothesis import strategies as st

from trio_supermachine import ConfigError
from trio_supermachine.net.sockets import (
    MAGIC,
    PATIENCE,
    SILENCE,
    HeaderSniffer,
    Route,
    UnixSockets,
    sniff,
)

from .test_net_relay import echo, read_all, tcp_pair

bodies = st.binary(max_size=40)
ports = st.integers(0, 65535)


def header(port: int) -> bytes:
    return MAGIC + port.to_bytes(4, "big")


def decide(chunks: list[bytes]) -> Route | None:
    """What a connection's chunks lead to; those that come later are the rest."""
    sniffer = HeaderSniffer()
    for i, chunk in enumerate(chunks):
        route = sniffer.feed(chunk)
        if route is not None:
            return Route(route.port, route.rest + b"".join(chunks[i + 1 :]))
    return None


# --- the state machine ---


@given(ports, bodies)
def test_a_header_is_found_in_every_split_in_two(port: int, body: bytes) -> None:
    data = header(port) + body
    for cut in range(len(data) + 1):
        assert decide([data[:cut], data[cut:]]) == Route(port, body)
    assert decide([data[i : i + 1] for i in range(len(data))]) == Route(port, body)


near = st.builds(lambda n, other: header(80)[:n] + other, st.integers(0, 20), bodies)


@given(st.one_of(bodies, near), st.lists(st.integers(1, 30), max_size=8))
@example(b"S", [])
@example(MAGIC[:12], [])
@example(MAGIC + b"\0", [])
def test_no_byte_is_lost_whatever_comes(data: bytes, sizes: list[int]) -> None:
    chunks = []
    rest = data
    for size in sizes:
        chunks.append(rest[:size])
        rest = rest[size:]
    chunks = [chunk for chunk in [*chunks, rest] if chunk]
    try:
        route = decide(chunks)
    except ValueError:
        assert data.startswith(MAGIC)
        assert int.from_bytes(data[16:20], "big") > 65535
        return
    if route is None:
        assert header(0)[:16].startswith(data[:16])
        assert len(data) < 20
        sniffer = HeaderSniffer()
        for chunk in chunks:
            sniffer.feed(chunk)
        assert sniffer.begun == bool(data)
        assert sniffer.end() == Route(0, data)
    elif data.startswith(MAGIC):
        assert route == Route(int.from_bytes(data[16:20], "big"), data[20:])
    else:
        assert route == Route(0, data)


def test_a_header_that_names_no_port_is_refused() -> None:
    with pytest.raises(ValueError, match="65536"):
        HeaderSniffer().feed(header(65536))


# --- its timers ---


async def test_who_says_nothing_for_a_moment_is_led_to_the_first_listener(
    autojump_clock: trio.testing.MockClock,
) -> None:
    _, stream = trio.testing.memory_stream_one_way_pair()
    begin = trio.current_time()
    assert await sniff(stream) == Route(0, b"")
    assert trio.current_time() - begin == pytest.approx(SILENCE)


async def test_half_a_header_has_five_seconds_to_become_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sender, stream = trio.testing.memory_stream_one_way_pair()
    async with trio.open_nursery() as nursery:

        async def trickle() -> None:
            for i in range(20):
                await sender.send_all(header(80)[i : i + 1])
                await trio.sleep(0.2)

        nursery.start_soon(trickle)
        assert await sniff(stream) == Route(80, b"")
    sender, stream = trio.testing.memory_stream_one_way_pair()
    await sender.send_all(MAGIC[:5])
    begin = trio.current_time()
    assert await sniff(stream) is None
    assert trio.current_time() - begin == pytest.approx(PATIENCE)


async def test_an_end_within_a_header_makes_it_none() -> None:
    sender, stream = trio.testing.memory_stream_one_way_pair()
    await sender.send_all(MAGIC[:5])
    await sender.aclose()
    assert await sniff(stream) == Route(0, MAGIC[:5])


# --- the sockets ---


@asynccontextmanager
async def serving(directory: Path | None) -> AsyncIterator[tuple[UnixSockets, list[int]]]:
    """The sockets of a guest that echoes, and the ports that it was asked for; -1 is the agent."""
    asked: list[int] = []

    async def connect(port: int) -> trio.SocketStream:
        asked.append(port)
        here, there = await tcp_pair()
        nursery.start_soon(echo, there)
        return here

    async def dial() -> trio.SocketStream:
        return await connect(-1)

    async with trio.open_nursery() as nursery:
        sockets = UnixSockets(directory, connect, dial)
        nursery.start_soon(sockets.run)
        yield sockets, asked
        nursery.cancel_scope.cancel()


async def test_bytes_behind_a_header_are_the_guests() -> None:
    async with serving(None) as (sockets, asked):
        for path, said, port, heard in (
            (sockets.vsock_path, header(80) + b"body", 80, b"body"),
            (sockets.vsock_path, header(80), 80, b""),
            (sockets.vsock_path, b"GET /", 0, b"GET /"),
            (sockets.vsock_path, MAGIC, 0, MAGIC),
            (sockets.vsock_path, b"", 0, b""),
            (sockets.exec_path, header(80) + b"body", -1, header(80) + b"body"),
        ):
            async with await trio.open_unix_socket(path) as client:
                await client.send_all(said)
                await client.send_eof()
                assert await read_all(client) == heard
            assert asked.pop() == port


async def test_sockets_have_their_mode_before_they_have_their_name(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with serving(tmp_path / "new") as (sockets, _):
            for path in (sockets.vsock_path, sockets.exec_path):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                assert path.parent == tmp_path / "new"
            assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    finally:
        os.umask(before)
    assert not os.listdir(tmp_path / "new")


async def test_a_private_directory_goes_with_its_sockets() -> None:
    async with serving(None) as (sockets, _):
        directory = sockets.vsock_path.parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        sockets.exec_path.unlink()  # somebody was faster
    assert not directory.exists()


async def test_what_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never() -> trio.SocketStream:
        raise AssertionError

    async def never_to(port: int) -> trio.SocketStream:
        raise AssertionError

    with pytest.raises(ConfigError, match="bytes"):
        UnixSockets(tmp_path / ("x" * 90), never_to, never)
    with (
        tempfile.TemporaryDirectory() as short,  # the test's own may be too long for a socket
        pytest.raises(FileNotFoundError),
    ):
        UnixSockets(Path(short, "missing", "mux"), never_to, never)
    made: list[socket.socket] = []
    bind = socket.socket.bind

    def bind_once(self: socket.socket, address: str) -> None:
        if made:
            raise OSError("no more")
        made.append(self)
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", bind_once)
    with pytest.raises(OSError, match="no more"):
        UnixSockets(tmp_path, never_to, never)
    assert not os.listdir(tmp_path)


async def test_a_hostile_client_waits_alone(autojump_clock: trio.testing.MockClock) -> None:
    async with serving(None) as (sockets, asked):
        hostile = [await trio.open_unix_socket(sockets.vsock_path) for _ in range(20)]
        for client in hostile:
            await client.send_all(MAGIC[:7])
        async with await trio.open_unix_socket(sockets.vsock_path) as polite:
            await polite.send_all(header(80) + b"hello")
            assert await polite.receive_some() == b"hello"
        for client in hostile:
            assert await client.receive_some() == b""
            await client.aclose()
        assert asked == [80]
