"""Forwards keep their promises to clients on the host, whatever is behind them.

Behind them are plain TCP and UDP servers of the host in the place of a guest's.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import attrs
import pytest
import trio
import trio.testing
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine import ConfigError
from trio_supermachine.agent import wire
from trio_supermachine.agent.client import FrameStream
from trio_supermachine.agent.wire import FrameType
from trio_supermachine.net import udp
from trio_supermachine.net.forward import TcpForwarder, open_tcp, open_tls
from trio_supermachine.net.serving import Server, bind
from trio_supermachine.net.tls import HANDSHAKE, TlsConfig, TlsStream
from trio_supermachine.net.udp import IDLE, MAX_FLOWS, UdpForwarder, UdpServer, open_udp
from trio_supermachine.vsock.carrier import SocketCarrier
from trio_supermachine.vsock.stream import VsockMux

from .test_net_relay import echo, read_all, tcp_pair

GUEST_PORT = 80


@asynccontextmanager
async def behind(
    server: Callable[[trio.SocketStream], Awaitable[None]] = echo,
) -> AsyncIterator[Callable[[int], Awaitable[trio.SocketStream]]]:
    """What connects to a server, as to a guest."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listener.socket.getsockname()

    async def connect(port: int) -> trio.SocketStream:
        assert port == GUEST_PORT
        return await trio.open_tcp_stream(*address)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server, [listener])
        yield connect
        nursery.cancel_scope.cancel()


Forward = TypeVar("Forward", TcpForwarder, UdpForwarder)


@asynccontextmanager
async def running(opened: tuple[Server | UdpServer, Forward]) -> AsyncIterator[Forward]:
    """Serve a forward for the length of a block, which gets what a user of it has."""
    server, forward = opened
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        yield forward
        await forward.aclose()


# --- TCP ---


async def test_a_thousand_clients_at_once_take_turns_within_the_limit() -> None:
    now = most = 0

    async def count(stream: trio.SocketStream) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await echo(stream)
        now -= 1

    async def client(address: tuple[str, int]) -> None:
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(b"x")
            await stream.send_eof()
            assert await read_all(stream) == b"x"

    async with behind(count) as connect:
        opened = await open_tcp(connect, "127.0.0.1", 0, GUEST_PORT, 20)
        async with running(opened) as forward, trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(client, forward.local_addr)
    assert 1 < most <= 21  # one may be on its way out


async def test_what_connecting_raises_resets_one_client_and_no_more() -> None:
    failures: list[Exception] = [
        ConnectionRefusedError(errno.ECONNREFUSED, "no"),
        trio.BrokenResourceError("gone"),
        OSError(errno.EMFILE, "too many"),
    ]

    async def connect(port: int) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        raise failures.pop()

    opened = await open_tcp(connect, "127.0.0.1", 0, GUEST_PORT)
    async with running(opened) as forward:
        while failures:
            async with await trio.open_tcp_stream(*forward.local_addr) as client:
                with pytest.raises(trio.BrokenResourceError):
                    await client.receive_some()


@pytest.mark.parametrize("stop_first", [False, True])
async def test_a_forward_ends_before_it_has_begun(stop_first: bool) -> None:
    async with behind() as connect:
        server, forward = await open_tcp(connect, "127.0.0.1", 0, GUEST_PORT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            if stop_first:
                await forward.stop()
            await forward.aclose()
            await forward.aclose()


async def test_a_cancelled_stop_has_stopped_all_the_same() -> None:
    async with behind() as connect:
        opened = await open_tcp(connect, "127.0.0.1", 0, GUEST_PORT)
        async with (
            running(opened) as forward,
            await trio.open_tcp_stream(*forward.local_addr) as client,
        ):
            await client.send_all(b"x")
            assert await client.receive_some() == b"x"
            with trio.move_on_after(0.1) as scope:
                await forward.stop()
            assert scope.cancelled_caught
            with pytest.raises(OSError, match="failed"):
                await trio.open_tcp_stream(*forward.local_addr)
            await client.send_all(b"y")
            assert await client.receive_some() == b"y"


async def test_the_task_that_serves_can_be_cancelled_at_any_checkpoint() -> None:
    async with behind() as connect:
        for checkpoints in range(30):
            server, forward = await open_tcp(connect, "127.0.0.1", 0, GUEST_PORT)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.run)
                nursery.start_soon(_use, forward.local_addr)
                for _ in range(checkpoints):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            await forward.stop()


async def _use(address: tuple[str, int]) -> None:
    try:
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(b"x")
            await stream.receive_some()
    except OSError:
        pass


async def test_addresses_that_cannot_be_had_are_named() -> None:
    taken = await bind("127.0.0.1", 0, socket.SOCK_STREAM)
    port = taken.getsockname()[1]
    with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port}.*the port is taken$") as caught:
        await bind("127.0.0.1", port, socket.SOCK_STREAM)
    assert caught.value.errno == errno.EADDRINUSE
    taken.close()
    with pytest.raises(OSError, match=r"192\.0\.2\.1:80") as caught:
        await bind("192.0.2.1", 80, socket.SOCK_STREAM)
    assert caught.value.errno == errno.EADDRNOTAVAIL


@pytest.mark.parametrize(
    ("guest_port", "target"), [(0, "the first listener"), (GUEST_PORT, f"port {GUEST_PORT}")]
)
async def test_a_forward_shows_where_it_leads(guest_port: int, target: str) -> None:
    async with behind() as connect:
        opened = await open_tcp(connect, "127.0.0.1", 0, guest_port)
        async with running(opened) as forward:
            port = forward.local_addr[1]
            assert repr(forward) == f"<TcpForwarder 127.0.0.1:{port} to {target}>"


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "nobody.invalid", ""])
async def test_what_is_no_address_is_told_so(host: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        await bind(host, 0, socket.SOCK_STREAM)


# --- TLS ---


@attrs.frozen
class Files:
    certificate: Path
    key: Path
    authority: trustme.CA

    def config(self, **more: object) -> TlsConfig:
        return TlsConfig(certificate=self.certificate, key=self.key, guest_port=GUEST_PORT, **more)  # type: ignore[arg-type]

    def client_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make_files(tmp_path)


def make_files(directory: Path) -> Files:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    issued.cert_chain_pems[0].write_to_path(os.fspath(certificate))
    issued.private_key_pem.write_to_path(os.fspath(key))
    return Files(certificate, key, authority)


async def tls_pair(files: Files) -> tuple[TlsStream, TlsStream]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    one, other = await tcp_pair()
    client = TlsStream(one, files.client_context(), server_hostname="127.0.0.1")
    server = TlsStream(other, context)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.shake_hands)
        nursery.start_soon(server.shake_hands)
    return client, server


async def test_tls_streams_pass_trios_own_checks(files: Files) -> None:
    async def pair() -> tuple[TlsStream, TlsStream]:
        return await tls_pair(files)

    await trio.testing.check_half_closeable_stream(pair, None)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 100_000), max_size=5),
    st.lists(st.integers(0, 100_000), max_size=5),
    st.integers(100, 100_000),
)
async def test_both_directions_of_tls_end_when_they_want_to(
    there: list[int], back: list[int], reads: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        client, server = await tls_pair(make_files(Path(directory)))

    async def send(stream: TlsStream, sizes: list[int]) -> None:
        for size in sizes:
            await stream.send_all(bytes(size))
        await stream.send_eof()

    async def receive(stream: TlsStream, sizes: list[int]) -> None:
        total = 0
        while chunk := await stream.receive_some(reads):
            assert len(chunk) <= reads
            total += len(chunk)
        assert total == sum(sizes)
        assert await stream.receive_some() == b""

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, client, there)
        nursery.start_soon(send, server, back)
        nursery.start_soon(receive, client, back)
        nursery.start_soon(receive, server, there)
    await client.aclose()
    await server.aclose()


async def test_a_server_that_has_ended_goes_on_receiving_what_was_not_read_yet(
    files: Files,
) -> None:
    client, server = await tls_pair(files)
    async with client, server:
        await client.send_all(bytes(50_000))
        assert await server.receive_some(1) == b"\0"  # which leaves the rest, decrypted or not
        await server.send_eof()
        assert await read_all(client) == b""
        await client.send_all(bytes(50_000))
        await client.send_eof()
        assert len(await read_all(server)) == 99_999


async def test_a_cut_connection_is_no_end_of_data(files: Files) -> None:
    client, server = await tls_pair(files)
    await client._transport.aclose()  # without close_notify
    with pytest.raises(trio.BrokenResourceError):
        await server.receive_some()
    await server.aclose()


async def test_trios_own_client_is_served(files: Files) -> None:
    async with behind() as connect:
        context = files.client_context()
        context.set_alpn_protocols(["http/1.1"])
        async with running(
            await open_tls(connect, files.config(alpn=["h2", "http/1.1"]))
        ) as forward:
            transport = await trio.open_tcp_stream(*forward.local_addr)
            client = trio.SSLStream(transport, context, server_hostname="127.0.0.1")
            await client.send_all(b"hello")
            assert await client.receive_some() == b"hello"
            await client.unwrap()  # which waits for the other end's close_notify
            await transport.aclose()


async def test_who_does_not_shake_hands_is_gone_after_ten_seconds(
    files: Files, autojump_clock: trio.testing.MockClock
) -> None:
    async with behind() as connect, running(await open_tls(connect, files.config())) as forward:
        for words in (b"", b"GET / HTTP/1.0\r\n\r\n"):
            client = await trio.open_tcp_stream(*forward.local_addr)
            if words:
                await client.send_all(words)
            begin = trio.current_time()
            with pytest.raises(trio.BrokenResourceError):
                while await client.receive_some():
                    pass
            assert trio.current_time() - begin <= HANDSHAKE + 1
            await client.aclose()


async def test_files_that_are_not_the_pem_they_should_be_are_named(
    files: Files, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = make_files(tmp_path / "other")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_bytes(b"-----BEGIN CERTIFICATE-----\nnonsense\n")
    encrypted = tmp_path / "encrypted.pem"
    key = load_pem_private_key(files.key.read_bytes(), None)
    how = BestAvailableEncryption(b"secret")
    encrypted.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))

    async def connect(port: int) -> trio.SocketStream:
        raise AssertionError

    for change, named in (
        ({"certificate": nonsense}, nonsense),
        ({"key": nonsense}, nonsense),
        ({"client_ca": nonsense}, nonsense),
        ({"key": other.key}, other.key),
        ({"key": files.certificate}, files.certificate),
        ({"certificate": files.key}, files.key),
        ({"key": encrypted}, encrypted),
    ):
        with pytest.raises(ConfigError, match=str(named)):
            await open_tls(connect, attrs.evolve(files.config(), **change))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="missing"):
        await open_tls(connect, attrs.evolve(files.config(), key=tmp_path / "missing"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"listen_addr": "127.0.0.1:80"},
        {"listen_addr": ("127.0.0.1", 65536)},
        {"listen_addr": ("", 80)},
        {"listen_addr": ("127.0.0.1", "80")},
        {"alpn": "h2"},
        {"alpn": 5},
        {"alpn": [""]},
        {"alpn": ["x" * 256]},
        {"alpn": [b"h2"]},
        {"guest_port": 65536},
        {"certificate": ""},
        {"key": None},
    ],
)
def test_a_tls_configuration_is_checked_where_it_is_written(wrong: dict[str, object]) -> None:
    right: dict[str, object] = {"certificate": "a", "key": "b"}
    with pytest.raises(ConfigError):
        TlsConfig(**(right | wrong))  # type: ignore[arg-type]


# --- UDP ---


@attrs.define
class Guest:
    """Takes connections as the agent does, and answers datagrams by what ``answer`` gives."""

    mux: VsockMux
    connected: int = 0
    live: int = 0
    answer: Callable[[bytes], bytes] = attrs.field(
        default=lambda data: wire.frame(FrameType.DATA, data)
    )

    async def connect(self, port: int) -> FrameStream:
        return FrameStream(await self.mux.dial(port), exactly=True)

    async def serve(self, listener: trio.abc.Listener[trio.abc.HalfCloseableStream]) -> None:
        await trio.serve_listeners(self._serve, [listener])

    async def _serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.connected += 1
        self.live += 1
        decoder = wire.FrameDecoder(datagrams=True)
        try:
            async with stream:
                async for chunk in stream:
                    decoder.feed(chunk)
                    for frame in decoder.frames():
                        assert frame.type == FrameType.DATA
                        await stream.send_all(self.answer(frame.payload))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.live -= 1


@asynccontextmanager
async def udp_guest() -> AsyncIterator[Guest]:
    left, right = socket.socketpair()
    host = VsockMux(SocketCarrier(left))
    guest = VsockMux(SocketCarrier(right), local_cid=3, peer_cid=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.run)
        nursery.start_soon(guest.run)
        found = Guest(host)
        nursery.start_soon(found.serve, guest.listen(GUEST_PORT, 1024))
        yield found
        nursery.cancel_scope.cancel()


async def udp_client(forward: UdpForwarder) -> trio.socket.SocketType:
    client = trio.socket.socket(type=socket.SOCK_DGRAM)
    await client.connect(forward.local_addr)
    return client


async def ask(client: trio.socket.SocketType, data: bytes) -> bytes:
    await client.send(data)
    return await client.recv(65536)


async def test_each_client_has_its_own_flow_and_datagrams_keep_their_bounds() -> None:
    async with udp_guest() as guest:
        opened = await open_udp(guest.connect, "127.0.0.1", 0, GUEST_PORT)
        async with running(opened) as forward:
            clients = [await udp_client(forward) for _ in range(4)]
            for i, client in enumerate(clients):
                for size in (0, 1, 65507):
                    assert await ask(client, bytes([i]) * size) == bytes([i]) * size
            assert guest.connected == 4
            for client in clients:
                client.close()


async def test_a_flow_ends_after_silence_and_talking_keeps_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with udp_guest() as guest:
        opened = await open_udp(guest.connect, "127.0.0.1", 0, GUEST_PORT)
        async with running(opened) as forward:
            client = await udp_client(forward)
            for _ in range(3):
                assert await ask(client, b"x") == b"x"
                await trio.sleep(IDLE * 0.9)
            assert (guest.connected, guest.live) == (1, 1)
            await trio.sleep(IDLE)
            assert (guest.connected, guest.live) == (1, 0)
            assert await ask(client, b"x") == b"x"
            assert guest.connected == 2
            client.close()


async def test_of_too_many_flows_the_most_silent_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "MAX_FLOWS", 3)
    async with udp_guest() as guest:
        opened = await open_udp(guest.connect, "127.0.0.1", 0, GUEST_PORT)
        async with running(opened) as forward:
            clients = [await udp_client(forward) for _ in range(4)]
            for client in clients[:3]:
                await ask(client, b"x")
            await ask(clients[0], b"x")  # now the second is the most silent
            await ask(clients[3], b"x")
            await trio.testing.wait_all_tasks_blocked()
            assert (guest.connected, guest.live) == (4, 3)
            await ask(clients[0], b"x")
            assert guest.connected == 4
            await ask(clients[1], b"x")
            assert guest.connected == 5
            for client in clients:
                client.close()
    assert MAX_FLOWS == 256


@pytest.mark.parametrize(
    "rude",
    [
        wire.frame(FrameType.OK, bytes(8)),
        wire.frame(FrameType.DATA, bytes(65508)),
        b"\xff" * 100,
        b"",
    ],
)
async def test_a_guest_that_answers_nonsense_loses_that_flow_alone(rude: bytes) -> None:
    async with udp_guest() as guest:
        polite = guest.answer
        guest.answer = lambda data: rude if data == b"be rude" else polite(data)
        opened = await open_udp(guest.connect, "127.0.0.1", 0, GUEST_PORT)
        async with running(opened) as forward:
            one, other = await udp_client(forward), await udp_client(forward)
            assert await ask(other, b"x") == b"x"
            await one.send(b"be rude")
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert await ask(one, b"y") == b"y"
            assert await ask(other, b"z") == b"z"
            assert guest.connected == (3 if rude else 2)
            one.close()
            other.close()


async def test_what_a_slow_guest_has_no_room_for_is_dropped_and_counted() -> None:
    async with udp_guest() as guest:

        async def never(port: int) -> FrameStream:
            await trio.sleep_forever()
            raise AssertionError

        opened = await open_udp(never, "127.0.0.1", 0, GUEST_PORT)
        async with running(opened) as forward:
            client = await udp_client(forward)
            for _ in range(40):
                await client.send(b"x")
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert forward.dropped == 40 - 16
            client.close()
        assert guest.connected == 0
