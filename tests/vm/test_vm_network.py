"""What listens in a guest is reached from the host, and ends as the VM does."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme

from trio_supermachine import ConfigError, Image, TcpForwarder, TlsConfig, Vm, VmConfig, VmExited
from trio_supermachine.agent import wire
from trio_supermachine.agent.wire import FrameDecoder, FrameType
from trio_supermachine.net.relay import reset
from trio_supermachine.net.sockets import MAGIC
from trio_supermachine.net.tls import TlsStream

from ..support import GUEST_PROGRAMS
from ..support.guests import PATIENCE, read_until

pytestmark = pytest.mark.vm

ECHO, HTTP, HALF, SPEAKER, SINK, UDP = 7001, 7002, 7003, 7004, 7005, 7006

#: Each port's program; its standard input and output are the connection.
SERVERS = {
    ECHO: ["cat"],
    HALF: ["sh", "-c", "wc -c; echo and more"],  # which answers at the end of its input
    SPEAKER: ["sh", "-c", "echo hello; cat"],
    SINK: ["sleep", "1000"],  # which reads nothing
}


@asynccontextmanager
async def serving(image: Image, config: VmConfig | None = None) -> AsyncIterator[Vm]:
    """A VM in which the servers listen."""
    async with Vm.start(image, config) as vm, trio.open_nursery() as nursery:
        await start_servers(vm, nursery)
        yield vm
        nursery.cancel_scope.cancel()


async def start_servers(vm: Vm, nursery: trio.Nursery) -> None:
    for port, program in SERVERS.items():
        command = ["nc", "-ll", "-p", str(port), "-e", *program]
        nursery.start_soon(vm.run_process, command)
        assert await vm.wait_listening(port) == port


@pytest.fixture
async def server(baked: Image) -> AsyncIterator[Vm]:
    async with serving(baked) as vm:
        yield vm


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    with trio.fail_after(PATIENCE):
        return b"".join([bytes(chunk) async for chunk in stream])


async def check_refused(forward: TcpForwarder) -> None:
    with trio.socket.socket() as client, pytest.raises(ConnectionRefusedError):
        await client.connect(forward.local_addr)


# --- connect ---


@pytest.mark.lab
async def test_connections_are_trios_half_closeable_streams(server: Vm) -> None:
    async with await server.connect(HALF) as stream:
        await stream.send_all(b"12345")
        await stream.send_eof()
        assert await read_all(stream) == b"5\nand more\n"
    async with await server.connect() as stream:  # the first listener
        await stream.send_all(b"echo")
        assert await read_until(stream, b"echo") == b"echo"


async def test_what_nobody_listens_on_refuses(server: Vm) -> None:
    with pytest.raises(ConnectionRefusedError):
        await server.connect(9)
    for port in (0, -1, 65536):
        with pytest.raises(ConfigError):
            await server.connect(port)


async def test_a_vm_without_a_listener_refuses_and_can_be_waited_for(vm: Vm) -> None:
    with pytest.raises(ConnectionRefusedError):
        await vm.connect()
    with trio.move_on_after(0.2) as scope:
        await vm.wait_listening()
    assert scope.cancelled_caught
    found: list[int] = []
    async with trio.open_nursery() as nursery:

        async def wait(port: int | None) -> None:
            found.append(await vm.wait_listening(port))
            if len(found) == 3:
                nursery.cancel_scope.cancel()

        for port in (None, ECHO, ECHO):
            nursery.start_soon(wait, port)
        nursery.start_soon(vm.run_process, ["nc", "-ll", "-p", str(ECHO), "-e", "cat"])
    assert found == [ECHO] * 3


async def test_a_connect_waits_while_the_vm_is_paused(server: Vm) -> None:
    await server.pause()
    with trio.move_on_after(0.2) as scope:
        await server.connect(ECHO)
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:

        async def connect() -> None:
            async with await server.connect(SPEAKER) as stream:
                assert await read_until(stream, b"\n") == b"hello\n"

        nursery.start_soon(connect)
        await trio.testing.wait_all_tasks_blocked()
        await server.resume()


async def test_a_connection_ends_with_its_vm(baked: Image) -> None:
    async with serving(baked) as vm:
        stream = await vm.connect(SINK)
    await read_all_or_reset(stream)
    await stream.aclose()
    with pytest.raises(VmExited):
        await vm.connect(ECHO)


# --- forwards of TCP ---


@pytest.mark.lab
async def test_a_forward_carries_bytes_and_ends_of_data(server: Vm) -> None:
    forward = await server.expose_tcp(guest_port=HALF)
    host, port = forward.local_addr
    assert host == "127.0.0.1"
    for size in (0, 5, 300_000):
        async with await trio.open_tcp_stream(host, port) as client:
            await client.send_all(bytes(size))
            await client.send_eof()
            assert await read_all(client) == b"%d\nand more\n" % size
    await forward.aclose()


async def test_a_forward_without_a_guest_port_leads_to_the_first_listener(server: Vm) -> None:
    async with await server.expose_tcp() as forward:
        client = await trio.open_tcp_stream(*forward.local_addr)
        await client.send_all(b"x")
        assert await client.receive_some() == b"x"
        await client.aclose()


async def test_a_client_of_a_port_that_nobody_listens_on_is_reset(server: Vm) -> None:
    forward = await server.expose_tcp(guest_port=9)
    client = await trio.open_tcp_stream(*forward.local_addr)
    with pytest.raises(trio.BrokenResourceError):
        await client.receive_some()
    await client.aclose()


@pytest.mark.lab
async def test_a_client_that_resets_resets_in_the_guest(vm: Vm) -> None:
    forward = await vm.expose_tcp(guest_port=ECHO)
    program = ["sh", "-c", "cat 2>/tmp/error"]
    async with vm.exec(["nc", "-l", "-p", str(ECHO), "-e", *program]) as child:
        await vm.wait_listening(ECHO)
        client = await trio.open_tcp_stream(*forward.local_addr)
        await client.send_all(b"x")
        assert await client.receive_some() == b"x"
        await reset(client)
        await child.wait()
    assert b"reset" in await vm.read_file("/tmp/error")


async def test_stop_lets_connections_in_flight_finish(server: Vm) -> None:
    forward = await server.expose_tcp(guest_port=ECHO)
    client = await trio.open_tcp_stream(*forward.local_addr)
    await client.send_all(b"before")
    assert await read_until(client, b"before")
    stopped = trio.Event()
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            await forward.stop()
            stopped.set()

        nursery.start_soon(stop)
        await trio.testing.wait_all_tasks_blocked()
        await check_refused(forward)
        assert not stopped.is_set()
        await client.send_all(b"after")
        assert await read_until(client, b"after")
        await client.send_eof()
        assert await read_all(client) == b""
        with trio.fail_after(PATIENCE):
            await stopped.wait()
    await client.aclose()
    await forward.stop()
    await forward.aclose()


async def test_closing_a_forward_resets_connections_in_flight(server: Vm) -> None:
    forward = await server.expose_tcp(guest_port=SINK)
    client = await trio.open_tcp_stream(*forward.local_addr)
    await client.send_all(bytes(100_000))
    with trio.CancelScope() as scope:
        scope.cancel()
        await forward.aclose()  # whose work is done also when cancelled
    assert scope.cancelled_caught
    with pytest.raises(trio.BrokenResourceError):
        await client.receive_some()
    await client.aclose()


async def test_forwards_end_as_soon_as_the_vm_does(vm: Vm) -> None:
    await vm.run_process(["httpd", "-p", str(HTTP)])
    forward = await vm.expose_tcp(guest_port=HTTP)
    unused = await vm.expose_udp(guest_port=UDP)
    async with await trio.open_tcp_stream(*forward.local_addr) as client:
        await client.send_all(b"GET ")
        events = vm.egress_events()
        await vm.stop(grace=0)
        assert await read_all_or_reset(client) == b""
        with trio.fail_after(PATIENCE):
            await forward.stop()
            await unused.aclose()
        await check_refused(forward)
        with pytest.raises(VmExited):
            await vm.expose_tcp(guest_port=HTTP)
        with pytest.raises(VmExited):
            assert vm.vsock_path
        assert [event async for event in events] == []


async def test_a_port_that_another_has_is_told_by_its_address(vm: Vm) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with listener:
        with pytest.raises(OSError, match=f"127.0.0.1:{port}") as caught:
            await vm.expose_tcp(port, ECHO)
        assert caught.value.errno == errno.EADDRINUSE
    for arguments in ((65536, 1), (-1, 1), (0, 65536), (0, -1), (True, 1)):
        with pytest.raises(ConfigError):
            await vm.expose_tcp(*arguments)
    for host in ("", "no.such.name.invalid", "a\0b", "ä"):
        with pytest.raises(ConfigError):
            await vm.expose_tcp(host=host)


async def test_beyond_the_limit_connections_wait_for_their_turn(server: Vm) -> None:
    forward = await server.expose_tcp(guest_port=SPEAKER, max_connections=1)
    first = await trio.open_tcp_stream(*forward.local_addr)
    assert await read_until(first, b"\n") == b"hello\n"
    second = await trio.open_tcp_stream(*forward.local_addr)
    with trio.move_on_after(0.3) as scope:
        await second.receive_some()
    assert scope.cancelled_caught
    await first.aclose()
    assert await read_until(second, b"\n") == b"hello\n"
    await second.aclose()


async def test_an_ipv6_address_is_one_to_listen_on(server: Vm) -> None:
    try:
        forward = await server.expose_tcp(guest_port=SPEAKER, host="::1")
    except OSError as exc:
        pytest.skip(f"no IPv6 here: {exc}")
    async with await trio.open_tcp_stream(*forward.local_addr) as client:
        assert await read_until(client, b"\n") == b"hello\n"


# --- what survives a snapshot ---


@pytest.mark.lab
async def test_listeners_survive_a_snapshot(vm: Vm, tmp_path: Path) -> None:
    await vm.write_file("/tmp/page", b"what is served")
    await vm.run_process(["httpd", "-p", "8080", "-h", "/tmp"])  # which leaves its group
    async with await vm.connect(8080) as open_meanwhile:
        image = await vm.snapshot(tmp_path / "snapshot")
        assert await get(open_meanwhile) == b"what is served"
    async with Vm.start(image) as copy:
        assert await copy.wait_listening() == 8080
        async with await copy.expose_tcp() as forward:
            assert await get(await trio.open_tcp_stream(*forward.local_addr)) == b"what is served"


async def get(stream: trio.abc.HalfCloseableStream) -> bytes:
    async with stream:
        await stream.send_all(b"GET /page HTTP/1.0\r\n\r\n")
        return (await read_all(stream)).partition(b"\r\n\r\n")[2]


# --- TLS ---


def issue(ca: trustme.CA, directory: Path) -> tuple[Path, Path]:
    issued = ca.issue_cert("127.0.0.1")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    issued.cert_chain_pems[0].write_to_path(os.fspath(certificate))
    issued.private_key_pem.write_to_path(os.fspath(key))
    return certificate, key


async def test_tls_ends_at_the_host(server: Vm, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate, key = issue(authority, tmp_path)
    authority.cert_pem.write_to_path(os.fspath(tmp_path / "ca.pem"))
    forward = await server.expose_tls(
        TlsConfig(
            certificate=certificate,
            key=key,
            client_ca=tmp_path / "ca.pem",
            alpn=("http/1.1",),
            guest_port=HALF,
        )
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)
    authority.issue_cert("client@example.org").configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    transport = await trio.open_tcp_stream(*forward.local_addr)
    client = TlsStream(transport, context, server_hostname="127.0.0.1")
    await client.shake_hands()
    assert client.protocol == "http/1.1"
    await client.send_all(bytes(200_000))
    await client.send_eof()  # close_notify, upon which the guest's program answers
    assert await read_all(client) == b"200000\nand more\n"
    await client.aclose()

    nobody = ssl.create_default_context()
    authority.configure_trust(nobody)
    transport = await trio.open_tcp_stream(*forward.local_addr)
    client = TlsStream(transport, nobody, server_hostname="127.0.0.1")
    with pytest.raises(trio.BrokenResourceError):
        await client.shake_hands()
        await client.receive_some()
    await client.aclose()


# --- UDP ---


async def test_datagrams_go_there_and_back(vm: Vm) -> None:
    await vm.write_file("/tmp/datagrams", datagram_program(), mode=0o755)
    async with vm.exec(["/tmp/datagrams", str(UDP)]) as child:
        await child.stdout.receive_some()
        async with await vm.expose_udp(0, UDP) as forward:
            clients = [trio.socket.socket(type=socket.SOCK_DGRAM) for _ in range(5)]
            for i, client in enumerate(clients):
                await client.connect(forward.local_addr)
                await client.send(b"client %d" % i)
            with trio.fail_after(PATIENCE):
                for i, client in enumerate(clients):
                    assert await client.recv(100) == b"client %d" % i
                for size in (0, 1, 1472, 1473, 65507):
                    await clients[0].send(bytes(size))
                    assert await clients[0].recv(65536) == bytes(size)
                await clients[1].send(b"burst 20")
                assert int(await clients[1].recv(100)) < 20
            assert forward.dropped == 0
            for client in clients:
                client.close()
        child.kill()


async def test_datagrams_to_what_nobody_receives_on_are_lost(vm: Vm) -> None:
    async with await vm.expose_udp(0, UDP) as forward:
        with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
            await client.connect(forward.local_addr)
            for _ in range(3):
                await client.send(b"lost")
            with trio.move_on_after(0.3) as scope:
                await client.recv(100)
            assert scope.cancelled_caught
    with pytest.raises(ConfigError):
        await vm.expose_udp(0, 0)


@cache
def datagram_program() -> bytes:
    """``guest_programs/datagrams.c`` for guests."""
    source = GUEST_PROGRAMS / "datagrams.c"
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "datagrams"
        command = ["cc", "-target", "x86_64-linux-musl", "-static", "-O1", "-s", "-o"]
        subprocess.run(
            [sys.executable, "-m", "ziglang", *command, os.fspath(program), os.fspath(source)],
            check=True,
        )
        return program.read_bytes()


# --- unix sockets ---


async def test_a_unix_socket_leads_to_the_port_that_its_header_names(server: Vm) -> None:
    path = server.vsock_path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for header, answer in (
        (MAGIC + HALF.to_bytes(4, "big"), b"4\nand more\n"),
        (b"", b"body"),
        (MAGIC + bytes(4), b"body"),
    ):
        async with await trio.open_unix_socket(path) as client:
            await client.send_all(header + b"body")
            await client.send_eof()
            assert await read_all(client) == answer
    async with await trio.open_unix_socket(path) as client:
        await client.send_all(MAGIC + (65536).to_bytes(4, "big"))
        assert await read_all_or_reset(client) == b""
    async with await trio.open_unix_socket(path) as client:
        await client.send_all(MAGIC + (9).to_bytes(4, "big"))
        assert await read_all_or_reset(client) == b""


async def read_all_or_reset(stream: trio.abc.ReceiveStream) -> bytes:
    got = b""
    try:
        async for chunk in stream:
            got += chunk
    except trio.BrokenResourceError:
        pass
    return got


async def test_a_client_that_says_nothing_hears_the_first_listener(vm: Vm) -> None:
    async with vm.exec(["nc", "-ll", "-p", str(SPEAKER), "-e", "echo", "hello"]) as child:
        await vm.wait_listening()
        async with await trio.open_unix_socket(vm.vsock_path) as client:
            assert await read_all(client) == b"hello\n"
        child.kill()


async def test_the_other_unix_socket_leads_to_the_agent(vm: Vm) -> None:
    assert stat.S_IMODE(vm.exec_path.stat().st_mode) == 0o600
    async with await trio.open_unix_socket(vm.exec_path) as client:
        await client.send_all(wire.frame(FrameType.PING))
        decoder = FrameDecoder()
        frames: list[wire.Frame] = []
        while not frames:
            decoder.feed(await client.receive_some())
            frames += decoder.frames()
        assert frames[0].type == FrameType.OK


async def test_unix_sockets_go_with_their_vm(baked: Image, tmp_path: Path) -> None:
    async with Vm.start(baked, VmConfig(vsock_mux_dir=tmp_path / "mux")) as vm:
        there = set((tmp_path / "mux").iterdir())
        assert there == {vm.vsock_path, vm.exec_path}
        client = await trio.open_unix_socket(vm.exec_path)
        async with Vm.start(baked, VmConfig(vsock_mux_dir=tmp_path / "mux")) as other:
            assert other.vsock_path != vm.vsock_path
    assert list((tmp_path / "mux").iterdir()) == []
    assert await read_all_or_reset(client) == b""
    await client.aclose()
    async with Vm.start(baked) as vm:
        private = vm.vsock_path.parent
        assert vm.exec_path.parent == private
    assert not private.exists()


async def test_a_directory_that_cannot_be_is_told_before_the_block(
    baked: Image, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        async with Vm.start(baked, VmConfig(vsock_mux_dir=tmp_path / "file")):
            raise AssertionError("entered")


# --- pools ---


async def test_what_an_acquirer_exposed_ends_with_its_turn(baked: Image) -> None:
    async with baked.pool().max(1).restore_on_release(False).build() as pool:
        async with pool.acquire() as vm:
            forward = await vm.expose_tcp(guest_port=ECHO)
        async with pool.acquire() as vm:
            assert vm.reused
            await check_refused(forward)
            await forward.stop()


# --- cancellation ---


async def test_a_cancelled_call_leaves_nothing_wherever_it_is(server: Vm) -> None:
    calls: list[Callable[[], Awaitable[trio.abc.AsyncResource]]] = [
        lambda: server.connect(ECHO),
        lambda: server.expose_tcp(guest_port=ECHO),
        lambda: server.expose_udp(guest_port=UDP),
    ]
    for call in calls:
        for checkpoints in range(8):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel_after, scope, checkpoints)
                    async with await call():
                        pass
                    nursery.cancel_scope.cancel()
    await server.ping()


async def cancel_after(scope: trio.CancelScope, checkpoints: int) -> None:
    for _ in range(checkpoints):
        await trio.lowlevel.checkpoint()
    scope.cancel()
