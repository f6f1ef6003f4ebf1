"""A connection through the agent is, to both its ends, the TCP connection that it stands in for."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
from collections.abc import Iterator

import attrs
import pytest
import trio
import trio.testing

from trio_supermachine import Image, Vm
from trio_supermachine.agent import wire
from trio_supermachine.agent.client import AgentClient
from trio_supermachine.agent.wire import FrameType

from ..support import guest_client as g
from ..support.agent_process import open_agent
from ..support.connecting import BIG, PATIENCE, connecting, listen, read_all, until_fds
from ..support.guest_client import Agent
from ..support.guest_fixtures import agent, bare_agent
from ..support.outside import program

__all__ = ["agent", "bare_agent"]  # fixtures

pytestmark = pytest.mark.long


# --- as streams ---


async def test_it_does_what_a_stream_does() -> None:
    async with connecting() as (agent, connect):
        before = agent.open_fds()
        with trio.fail_after(PATIENCE):
            await trio.testing.check_half_closeable_stream(connect, None)
        await until_fds(agent, before)


async def test_a_program_that_does_not_read_holds_the_host_back_and_its_leaving_frees_it() -> None:
    async with connecting() as (agent, connect):
        before = agent.open_fds()
        stream, program = await connect()
        with trio.fail_after(PATIENCE), pytest.raises(trio.BrokenResourceError):
            with trio.move_on_after(0.3):
                await stream.send_all(BIG * 16)
            await program.aclose()
            while True:
                await stream.send_all(BIG)
        await stream.aclose()
        await until_fds(agent, before)


# --- what is under way at an end ---


async def test_what_was_accepted_is_handed_on_after_the_host_has_left() -> None:
    async with connecting() as (agent, connect):
        before = agent.open_fds()
        stream, program = await connect()
        with trio.move_on_after(0.3):
            await stream.send_all(BIG * 4)  # and the program does not read
        await stream.aclose()
        with trio.fail_after(PATIENCE):
            got = await read_all(program)
        assert len(got) > 65536
        assert (BIG * 4).startswith(got)
        await program.aclose()
        await until_fds(agent, before)


async def test_what_was_accepted_is_handed_on_when_both_have_ended() -> None:
    async with connecting() as (agent, connect):
        before = agent.open_fds()
        stream, program = await connect()
        data = bytes(300_000)
        program.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await stream.send_all(data)
        await stream.send_eof()
        await program.send_eof()
        assert await stream.receive_some() == b""
        await stream.aclose()
        with trio.fail_after(PATIENCE):
            assert await read_all(program) == data
        await program.aclose()
        await until_fds(agent, before)


async def test_a_program_that_writes_to_a_host_that_has_left_is_reset() -> None:
    async with connecting() as (_, connect):
        stream, program = await connect()
        await stream.aclose()
        with trio.fail_after(PATIENCE):
            assert await program.receive_some() == b""
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await program.send_all(b"x" * 1000)
        await program.aclose()


async def test_an_answer_that_was_given_without_hearing_the_question_arrives() -> None:
    async with connecting() as (_, connect):
        stream, program = await connect()
        await stream.send_all(b"question")
        await program.send_all(b"answer")
        await trio.lowlevel.wait_readable(program.socket)
        await program.aclose()  # with something unread: by TCP it is a reset
        with trio.fail_after(PATIENCE):
            assert await stream.receive_some() == b"answer"
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        await stream.aclose()


async def test_the_end_of_the_machine_breaks_the_stream() -> None:
    async with connecting() as (agent, connect):
        stream, program = await connect()
        agent.kill()
        with trio.fail_after(PATIENCE), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        await stream.aclose()
        await program.aclose()


def test_a_copys_programs_read_a_reset_and_its_listeners_are_reached(agent: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        request = g.frame(g.CONNECT, g.u32(g.TCP) + g.u32(listener.getsockname()[1]))
        connection = agent.dial()
        connection.send(request)
        connection.expect(g.OK)
        program, _ = listener.accept()
        with program:
            program.settimeout(PATIENCE)
            agent.freeze()
            agent.restore()
            with pytest.raises(ConnectionResetError):
                program.recv(1)
        connection = agent.dial()
        connection.send(request)
        connection.expect(g.OK)
        listener.accept()[0].close()


# --- where it leads ---


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "127.9.8.7"])
async def test_it_leads_to_whatever_address_listens(host: str) -> None:
    async with open_agent() as (client, _):
        listener, port = await listen(host)
        async with listener:
            with trio.fail_after(PATIENCE):
                stream, _ = await client.connect(port)
                program = await listener.accept()
                await program.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
            await stream.aclose()
            await program.aclose()


async def test_a_port_that_nobody_listens_on_refuses() -> None:
    async with open_agent() as (client, agent):
        before = agent.open_fds()
        listener, port = await listen()
        await listener.aclose()
        for connect in (client.connect, client.connect_udp):
            with pytest.raises(ConnectionRefusedError, match=f"port {port}"):
                await connect(port)
        with pytest.raises(ValueError, match="65536"):
            await client.connect(65536)
        await until_fds(agent, before)


async def test_bytes_and_an_end_right_behind_the_request_are_the_programs() -> None:
    async with open_agent() as (client, _):
        listener, port = await listen()
        async with listener:
            stream = await client.dial()
            await stream.send_all(wire.connect(wire.Protocol.TCP, port) + b"early ")
            await stream.send_all(b"bytes")
            await stream.send_eof()
            program = await listener.accept()
            with trio.fail_after(PATIENCE):
                assert await read_all(program) == b"early bytes"
            await program.aclose()
            assert await read_all(stream) == wire.ok(port)
            await stream.aclose()


async def test_a_cancelled_attempt_leaves_nothing() -> None:
    async with open_agent() as (client, agent):
        before = agent.open_fds()
        listener, port = await listen()
        listener.socket.listen(0)
        held: list[trio.abc.Stream] = [await trio.open_tcp_stream("127.0.0.1", port)]
        async with listener:
            tried = 0
            while True:  # until its backlog is full: then connecting waits
                with trio.move_on_after(0.3) as scope:
                    held.append((await client.connect(port))[0])
                tried += 1
                if scope.cancelled_caught:
                    break
            assert tried < 10
        for stream in held:
            await stream.aclose()
        await until_fds(agent, before)


# --- datagrams ---


async def test_datagrams_keep_their_bounds() -> None:
    async with open_agent() as (client, agent):
        before = agent.open_fds()
        program = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with program:
            program.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            await program.bind(("127.0.0.1", 0))
            flow = await client.connect_udp(program.getsockname()[1])
            with trio.fail_after(PATIENCE):
                for size in (1, 0, 65507, 20, 32768, 0, 65507):
                    data = os.urandom(size)
                    await flow.send(wire.frame(FrameType.DATA, data))
                    got, sender = await program.recvfrom(65536)
                    assert got == data
                    await program.sendto(data[::-1], sender)
                    frame = await flow.receive()
                    assert frame is not None
                    assert frame == (FrameType.DATA, 0, data[::-1])
            flow.leave(complete=False)
        await until_fds(agent, before)


async def test_a_datagram_that_nobody_takes_any_more_harms_nothing() -> None:
    async with open_agent() as (client, _):
        program = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await program.bind(("127.0.0.1", 0))
        address = program.getsockname()
        flow = await client.connect_udp(address[1])
        program.close()
        for _ in range(3):
            await flow.send(wire.frame(FrameType.DATA, b"lost"))
        await client.call(wire.frame(FrameType.PING))
        again = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with again, trio.fail_after(PATIENCE):
            await again.bind(address)
            await flow.send(wire.frame(FrameType.DATA, b"found"))
            assert await again.recv(100) == b"found"
        flow.leave(complete=False)


@pytest.mark.parametrize(
    "wrong",
    [
        wire.frame(FrameType.DATA, bytes(65508)),
        wire.frame(FrameType.DATA, b"x", stream=1),
        wire.frame(FrameType.END),
    ],
)
async def test_what_is_no_datagram_ends_the_flow(wrong: bytes) -> None:
    async with open_agent() as (client, agent):
        before = agent.open_fds()
        program = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with program:
            await program.bind(("127.0.0.1", 0))
            flow = await client.connect_udp(program.getsockname()[1])
            await flow.send(wrong)
            with trio.fail_after(PATIENCE), pytest.raises(trio.BrokenResourceError):
                await flow.receive()
            flow.leave(complete=False)
        await until_fds(agent, before)


# --- waiting for a port ---


async def awaited(client: AgentClient, port: int, timeout_ms: int) -> int:
    return wire.decode_u64((await client.call(wire.await_listener(timeout_ms, port))).payload)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_who_waits_for_a_port_is_told_of_this_one(host: str) -> None:
    async with open_agent() as (client, _), trio.open_nursery() as nursery:
        other, _ = await listen()
        listener, port = await listen(host)
        await listener.aclose()
        assert await awaited(client, port, 0) == 0
        assert await awaited(client, port, 30) == 0
        tell, told = trio.open_memory_channel[int](3)

        async def wait() -> None:
            await tell.send(await awaited(client, port, 60_000))

        for _ in range(3):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        async with (await listen(host, port))[0], other:
            with trio.fail_after(PATIENCE):
                assert [await told.receive() for _ in range(3)] == [port] * 3


# --- many ---


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
async def test_two_thousand_connections_at_once() -> None:
    async with connecting() as (agent, connect):
        before, resident = agent.open_fds(), agent.resident_kib()
        with trio.fail_after(PATIENCE * 3):
            pairs = [await connect() for _ in range(2000)]
            for n, (stream, _) in enumerate(pairs):
                await stream.send_all(b"%d" % n)
            for n, (_, program) in enumerate(pairs):
                assert await program.receive_some() == b"%d" % n
                await program.send_all(b"%d back" % n)
            for n, (stream, _) in enumerate(pairs):
                assert await stream.receive_some() == b"%d back" % n
            assert agent.resident_kib() - resident < 4096
            for stream, program in pairs:
                await stream.aclose()
                await program.aclose()
            await until_fds(agent, before)


async def test_connections_that_are_never_idle_starve_nobody() -> None:
    async with open_agent() as (client, _), trio.open_nursery() as nursery:
        listener, port = await listen()

        async def talk(stream: trio.abc.SendStream) -> None:
            while True:
                await stream.send_all(BIG)

        async def hear(stream: trio.abc.ReceiveStream) -> None:
            async for _ in stream:
                pass

        streams: list[trio.abc.Stream] = []
        for _ in range(8):
            streams += [(await client.connect(port))[0], await listener.accept()]
        for stream in streams:
            nursery.start_soon(talk, stream)
            nursery.start_soon(hear, stream)
        with trio.fail_after(PATIENCE):
            for _ in range(50):
                await client.call(wire.frame(FrameType.PING))
        nursery.cancel_scope.cancel()
    for left in (listener, *streams):
        await trio.aclose_forcefully(left)


# --- in a machine ---


@pytest.mark.vm
async def test_a_connection_to_a_program_in_a_machine(busybox: Image) -> None:
    async with Vm.start(busybox) as vm:
        client = vm._running.client
        server = ["nc", "-l", "-p", "8000", "-e", "sh", "-c", "sleep 1; md5sum"]
        async with vm.exec(server):
            with trio.fail_after(PATIENCE):
                assert await awaited(client, 8000, 60_000) == 8000
                stream, port = await client.connect()
                assert port == 8000
                await stream.send_all(BIG)
                await stream.send_eof()
                digest = hashlib.md5(BIG).hexdigest()
                assert await read_all(stream) == f"{digest}  -\n".encode()
                with pytest.raises(ConnectionRefusedError, match="port 8000"):
                    await client.connect(8000)
            await stream.aclose()


@pytest.mark.vm
async def test_a_port_that_the_kernel_gives_to_clients_is_not_connected_to_itself(
    busybox: Image,
) -> None:
    async with Vm.start(busybox) as vm:
        ports = "/proc/sys/net/ipv4/ip_local_port_range"
        await vm.run_process(["sh", "-c", f"echo 40000 40000 >{ports}"])
        with trio.fail_after(PATIENCE), pytest.raises(ConnectionRefusedError, match="port 40000"):
            await vm._running.client.connect(40000)


@pytest.mark.vm
async def test_the_agents_own_port_is_none_that_is_listened_on(busybox: Image) -> None:
    async with Vm.start(busybox) as vm:
        for connect in (vm._running.client.connect, vm._running.client.connect_udp):
            with trio.fail_after(PATIENCE), pytest.raises(ConnectionRefusedError):
                await connect(61030)
        assert await awaited(vm._running.client, 61030, 0) == 0


@pytest.mark.vm
@pytest.mark.several_vcpus
async def test_the_first_listener_stays_the_first_whatever_processor_the_next_runs_on(
    busybox: Image,
) -> None:
    async with Vm.start(attrs.evolve(busybox, vcpus=2)) as vm:
        client = vm._running.client
        for masks in ("12", "21"):  # in one of the two orders the second socket's number is lower
            async with vm.exec(["taskset", masks[0], "nc", "-l", "-p", "8000"]) as first:
                with trio.fail_after(PATIENCE):
                    assert await awaited(client, 0, 60_000) == 8000
                    async with vm.exec(["taskset", masks[1], "nc", "-l", "-p", "7000"]):
                        assert await awaited(client, 7000, 60_000) == 7000
                        assert await awaited(client, 0, 0) == 8000
                        first.kill()
                        await first.wait()
                        stream, port = await client.connect()
                        assert port == 7000
                        await stream.aclose()


@pytest.mark.vm
@pytest.mark.usefixtures("many_files")
@pytest.mark.qemu  # on others the windows are those of the guest's kernel
async def test_connections_that_a_program_never_takes_leave_memory_for_others(
    busybox: Image,
) -> None:
    async with Vm.start(attrs.evolve(busybox, memory_mib=128)) as vm:
        await vm.write_file("/outside", program(), mode=0o755)
        await vm.run_process(["sh", "-c", "echo 4096 >/proc/sys/net/core/somaxconn"])
        async with vm.exec(["/outside", "deaf", "8000"]) as deaf, trio.open_nursery() as nursery:
            with trio.fail_after(PATIENCE * 2):
                await vm.wait_listening(8000)
                streams = [await vm.connect(8000) for _ in range(900)]
                for stream in streams:
                    nursery.start_soon(stream.send_all, BIG)
                for _ in range(30):
                    await vm.run_process(["true"])
            deaf.kill()
            nursery.cancel_scope.cancel()
        for stream in streams:
            await trio.aclose_forcefully(stream)
