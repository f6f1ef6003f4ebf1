"""What a guest sends out: connected and byte-exact where its policy lets it, refused elsewhere."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import attrs
import dns.message
import dns.rcode
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine.agent import wire
from trio_supermachine.agent.wire import FrameType, WireError
from trio_supermachine.errors import VmExited
from trio_supermachine.net.addresses import HOST_NAME
from trio_supermachine.net.datagrams import DatagramDecoder, DatagramStream, encode
from trio_supermachine.net.egress import MAX_RESOLVING, MAX_UNDECIDED, OPEN_TIMEOUT
from trio_supermachine.net.events import EgressEvent
from trio_supermachine.net.flows import DNS_IDLE, UDP_IDLE
from trio_supermachine.net.policy import EgressPolicy
from trio_supermachine.vsock.connection import State
from trio_supermachine.vsock.packet import Op, pack_header
from trio_supermachine.vsock.stream import VsockStream

from ..support.egress_guest import PORT, TCP, UDP, Agent, Refused, egress, expect_ok, open_frame
from ..support.processes import open_files
from .test_net_resolver import Hosts

HOST = "192.0.0.3"
HOST6 = "fd73:6d00::3"
RESOLVER = "192.0.0.1"
NAMED = EgressPolicy.allow(hosts=[HOST_NAME])
DATA = bytes(range(256)) * 4096  # 1 MiB


def other_address() -> str | None:
    """An address of this host that is no loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("198.51.100.1", 9))
        except OSError:
            return None
        address = str(sock.getsockname()[0])
        return None if address.startswith("127.") else address


@asynccontextmanager
async def server(
    handle: Callable[[trio.SocketStream], Awaitable[object]], host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """A TCP server on the host; gives its port."""
    async with trio.open_nursery() as nursery:

        async def serve(stream: trio.SocketStream) -> None:
            async with stream:
                try:
                    await handle(stream)
                except trio.BrokenResourceError:
                    pass

        listeners = await trio.open_tcp_listeners(0, host=host)
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)
    await stream.send_eof()


@asynccontextmanager
async def udp_echo(host: str = "127.0.0.1") -> AsyncIterator[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with trio.socket.socket(family, socket.SOCK_DGRAM) as sock:
        await sock.bind((host, 0))

        async def serve() -> None:
            while True:
                data, peer = await sock.recvfrom(65536)
                await sock.sendto(data, peer)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield sock.getsockname()[1]
            nursery.cancel_scope.cancel()


async def exchange(stream: VsockStream, data: bytes) -> bytes:
    """Send it all, end, and give what comes back to the end."""
    got = b""
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(send)
        async for chunk in stream:
            got += chunk
    await stream.aclose()
    return got


def decided(events: trio.MemoryReceiveChannel[EgressEvent]) -> list[EgressEvent]:
    """All events so far."""
    got = []
    while True:
        try:
            got.append(events.receive_nowait())
        except trio.WouldBlock:
            return got


async def idle(agent: Agent) -> None:
    """Wait until no connection goes out any more."""
    while agent.server._connections or agent.server._undecided:
        await trio.testing.wait_all_tasks_blocked()


# --- TCP ---


@pytest.mark.parametrize(
    ("address", "listens"),
    [(HOST, "127.0.0.1"), (HOST6, "::1"), (HOST, "::1"), (HOST6, "127.0.0.1")],
)
async def test_the_hosts_loopback_is_there_by_its_name_in_either_family(
    address: str, listens: str
) -> None:
    async with server(echo, listens) as port, egress(NAMED) as agent:
        assert await exchange(await agent.tcp(address, port), DATA) == DATA


async def test_what_is_sent_right_behind_the_open_arrives() -> None:
    async with server(echo) as port, egress(NAMED) as agent:
        stream = await agent.dial()
        await stream.send_all(open_frame(TCP, HOST, port) + b"early ")
        await stream.send_all(b"bird")
        await stream.send_eof()
        await expect_ok(stream)
        assert b"".join([chunk async for chunk in stream]) == b"early bird"
        await stream.aclose()


async def test_the_hosts_other_addresses_are_reached_by_their_network_alone() -> None:
    address = other_address()
    if address is None:
        pytest.skip("this host has no address but its loopback")
    async with server(echo, address) as port:
        async with egress(EgressPolicy.allow(cidrs=[address], ports=[port])) as agent:
            assert await exchange(await agent.tcp(address, port), b"data") == b"data"
        for policy in (
            EgressPolicy.deny_private(),
            EgressPolicy.deny_all(),
            NAMED,
            EgressPolicy.deny(cidrs=[address]),
            EgressPolicy.allow(cidrs=[address], ports=[port ^ 1]),
            EgressPolicy.allow(ports=[port]),
        ):
            async with egress(policy) as agent:
                with pytest.raises(Refused) as refused:
                    await agent.tcp(address, port)
                assert refused.value.errno == errno.EACCES


@pytest.mark.parametrize(
    "policy",
    [
        EgressPolicy.deny_private(),
        EgressPolicy.allow_all(),
        EgressPolicy.deny(ports=[1]),
        EgressPolicy.allow(cidrs=["0.0.0.0/0", "::/0"]),
        NAMED,
    ],
    ids=str,
)
async def test_no_address_of_loopback_reaches_the_host(policy: EgressPolicy) -> None:
    reached = []

    async def note(stream: trio.SocketStream) -> None:
        reached.append(stream)

    async with server(note) as port, egress(policy) as agent:
        for address in (
            *("127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::127.0.0.1"),
            *("192.0.0.2", "192.0.0.1", "127.64.0.5", "fd73:6d00:0:1::5", "fd73:6d00::2"),
            *("224.0.0.1", "255.255.255.255", "64:ff9b::7f00:1", "2002:7f00:1::"),
        ):
            for protocol in (TCP, UDP):
                with pytest.raises(Refused) as refused:
                    await agent.open(protocol, address, port)
                assert refused.value.errno == errno.EACCES
    assert not reached


async def test_the_true_error_of_a_connection_is_told() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with egress(NAMED) as agent:
            with pytest.raises(Refused) as refused:
                await agent.tcp(HOST, closed.getsockname()[1])
    assert refused.value.errno == errno.ECONNREFUSED


@asynccontextmanager
async def silent_port() -> AsyncIterator[int]:
    """A port whose handshakes are never answered, as its backlog is full."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        try:
            yield full.getsockname()[1]
        finally:
            for filler in fillers:
                filler.close()


async def test_a_peer_that_does_not_answer_is_a_timeout(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with silent_port() as port, egress(NAMED) as agent:
        with pytest.raises(Refused) as refused:
            await agent.tcp(HOST, port)
    assert refused.value.errno == errno.ETIMEDOUT


@pytest.mark.parametrize("leave", ["abort", "close"])
async def test_a_guest_that_leaves_while_it_is_connected_ends_the_attempt(leave: str) -> None:
    async with silent_port() as port, egress(NAMED) as agent:
        stream = await agent.dial()
        await stream.send_all(open_frame(TCP, HOST, port))
        while not agent.server._connections:
            await trio.testing.wait_all_tasks_blocked()
        if leave == "abort":
            stream.abort()
        else:
            await stream.aclose()
        await idle(agent)


async def test_a_guest_that_ends_sending_early_is_connected_all_the_same() -> None:
    async with server(echo) as port, egress(NAMED) as agent:
        stream = await agent.dial()
        await stream.send_all(open_frame(TCP, HOST, port) + b"all")
        await stream.send_eof()
        await expect_ok(stream)
        assert b"".join([chunk async for chunk in stream]) == b"all"
        await stream.aclose()


async def test_a_reset_of_the_server_is_one_for_the_guest_and_back() -> None:
    heard = trio.Event()

    async def reset(stream: trio.SocketStream) -> None:
        if await stream.receive_some() == b"you":
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        heard.set()

    async with server(reset) as port, egress(NAMED) as agent:
        stream = await agent.tcp(HOST, port)
        await stream.send_all(b"you")
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        stream.abort()
        stream = await agent.tcp(HOST, port)
        await stream.send_all(b"I")
        await trio.testing.wait_all_tasks_blocked()
        stream.abort()
        await heard.wait()
        await idle(agent)


pieces = st.lists(st.binary(min_size=1, max_size=3000), max_size=8)


@settings(max_examples=20, deadline=None)
@given(up=pieces, down=pieces, first=st.booleans())
def test_both_directions_are_byte_exact_whatever_ends_first(
    up: list[bytes], down: list[bytes], first: bool
) -> None:
    taken = b""

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal taken

        async def give() -> None:
            for piece in down:
                await stream.send_all(piece)
            await stream.send_eof()

        if first:
            await give()
        async for chunk in stream:
            taken += chunk
        if not first:
            await give()

    async def main() -> bytes:
        async with server(serve) as port, egress(NAMED) as agent:
            stream = await agent.dial()
            await stream.send_all(open_frame(TCP, HOST, port))
            for piece in up:
                await stream.send_all(piece)
                await trio.lowlevel.checkpoint()
            await stream.send_eof()
            await expect_ok(stream)
            got = b"".join([chunk async for chunk in stream])
            await stream.aclose()
            await idle(agent)
            return got

    assert trio.run(main) == b"".join(down)
    assert taken == b"".join(up)


# --- names ---


async def test_an_address_is_reached_by_the_name_that_it_was_told_for() -> None:
    address = other_address()
    if address is None:
        pytest.skip("this host has no address but its loopback")
    hosts = Hosts({"a.example": [address], "b.example": ["127.0.0.1"]})
    trio.socket.set_custom_hostname_resolver(hosts)
    policy = EgressPolicy.allow(hosts=["a.example", "b.example"], cidrs=[address])
    async with server(echo, address) as port, egress(policy) as agent:
        events = agent.server.subscribe()
        query = dns.message.make_query("a.example", "A").to_wire()
        answer = dns.message.from_wire(await agent.resolve(query))
        assert [r.to_text() for r in answer.answer[0]] == [address]
        assert await exchange(await agent.tcp(address, port), b"x") == b"x"
        query = dns.message.make_query("b.example", "A").to_wire()
        assert not dns.message.from_wire(await agent.resolve(query)).answer
        told = [(e.protocol, e.allowed, e.host, e.address) for e in decided(events)]
    assert told == [
        ("dns", True, "a.example", None),
        ("tcp", True, "a.example", address),
        ("dns", False, "b.example", None),
    ]


async def test_only_what_was_told_for_a_listed_name_is_let_out() -> None:
    hosts = Hosts({"a.example": ["93.184.216.34"], "b.example": ["1.1.1.1"]})
    trio.socket.set_custom_hostname_resolver(hosts)
    async with egress(EgressPolicy.allow(hosts=["a.example"], ports=[443])) as agent:
        events = agent.server.subscribe()

        async def verdict(address: str, port: int) -> tuple[bool, str | None]:
            stream = await agent.dial()
            await stream.send_all(open_frame(TCP, address, port))
            event = await events.receive()
            stream.abort()
            return event.allowed, event.host

        async def look_up(name: str) -> None:
            await agent.resolve(dns.message.make_query(name, "A").to_wire())
            await events.receive()

        assert await verdict("93.184.216.34", 443) == (False, None)
        await look_up("a.example")
        await look_up("b.example")
        assert await verdict("93.184.216.34", 443) == (True, "a.example")
        assert await verdict("93.184.216.34", 80) == (False, "a.example")
        assert await verdict("1.1.1.1", 443) == (False, None)
        # The name moves to where the guest may not go: neither way leads there.
        hosts.table["a.example"] = ["169.254.169.254", "10.0.0.1"]
        await look_up("a.example")
        assert await verdict("169.254.169.254", 443) == (False, None)
        assert await verdict("10.0.0.1", 443) == (False, None)
        assert await verdict("93.184.216.34", 443) == (True, "a.example")


async def test_dns_over_tcp_answers_question_after_question() -> None:
    hosts = Hosts({"a.example": [f"8.8.8.{n}" for n in range(99)]})
    trio.socket.set_custom_hostname_resolver(hosts)
    async with egress(EgressPolicy.deny_private()) as agent:
        stream = await agent.tcp(RESOLVER, 53)
        queries = [dns.message.make_query("a.example", kind) for kind in ("A", "AAAA", "A")]
        sent = b"".join(query.to_wire(prepend_length=True) for query in queries)
        for n in range(len(sent)):
            await stream.send_all(sent[n : n + 1])
        await stream.send_eof()
        got = b"".join([chunk async for chunk in stream])
        await stream.aclose()
    for query in queries:
        (length,) = struct.unpack("!H", got[:2])
        answer = dns.message.from_wire(got[2 : 2 + length])
        assert query.is_response(answer)
        got = got[2 + length :]
    assert not got


async def test_questions_of_one_flow_are_answered_side_by_side() -> None:
    trio.socket.set_custom_hostname_resolver(Hosts({"a.example": ["8.8.8.8", "2606:4700::1"]}))
    async with egress(EgressPolicy.deny_private()) as agent:
        flow = await agent.udp(RESOLVER, 53)
        queries = [dns.message.make_query("a.example", kind) for kind in ("A", "AAAA")]
        for query in queries:
            assert flow.send_nowait(query.to_wire())
        answers = [dns.message.from_wire(await receive(flow)) for _ in queries]
        assert {answer.id for answer in answers} == {query.id for query in queries}


async def receive(flow: DatagramStream) -> bytes:
    datagram = await flow.receive()
    assert datagram is not None
    return datagram


async def test_no_more_than_64_questions_are_looked_up_at_once() -> None:
    hosts = Hosts({})
    hosts.silent = True
    trio.socket.set_custom_hostname_resolver(hosts)
    async with egress(EgressPolicy.deny_private()) as agent:
        for n in range(4):
            flow = await agent.udp(RESOLVER, 53)
            for k in range(30):
                flow.send_nowait(dns.message.make_query(f"n{n}k{k}.example", "A").to_wire())
        while hosts.at_once < 64:
            await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert hosts.most == 64
    assert not hosts.at_once


async def test_a_resolver_flow_that_asks_nothing_ends(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with egress(EgressPolicy.deny_private()) as agent:
        udp = await agent.udp(RESOLVER, 53)
        tcp = await agent.tcp(RESOLVER, 53)
        assert await udp.receive() is None
        assert await tcp.receive_some() == b""
        assert trio.current_time() >= DNS_IDLE


# --- UDP ---


@pytest.mark.parametrize("address", [HOST, HOST6])
async def test_datagrams_go_out_and_come_back_whole(address: str) -> None:
    async with udp_echo("::1" if ":" in address else "127.0.0.1") as port, egress(NAMED) as agent:
        flow = await agent.udp(address, port)
        for size in (0, 1, 1400, 65507):
            assert flow.send_nowait(bytes(size))
            assert await receive(flow) == bytes(size)


async def test_a_flow_survives_a_port_that_nobody_has() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    async with egress(NAMED) as agent:
        flow = await agent.udp(HOST, port)
        assert flow.send_nowait(b"lost")
        await trio.testing.wait_all_tasks_blocked()
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as late:
            await late.bind(("127.0.0.1", port))
            with trio.move_on_after(30):
                while True:
                    flow.send_nowait(b"found")
                    with trio.move_on_after(0.05):
                        data, peer = await late.recvfrom(100)
                        break
            assert data == b"found"
            await late.sendto(b"back", peer)
            assert await receive(flow) == b"back"


async def test_a_silent_flow_ends_and_one_that_talks_does_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with udp_echo() as port, egress(NAMED) as agent:
        flow = await agent.udp(HOST, port)
        for _ in range(3):
            await trio.sleep(UDP_IDLE - 1)
            assert flow.send_nowait(b"still here")
            assert await receive(flow) == b"still here"
        start = trio.current_time()
        assert await flow.receive() is None
        assert trio.current_time() - start >= UDP_IDLE - 1
        await idle(agent)


async def test_a_guest_that_does_not_read_costs_no_more_than_its_window() -> None:
    flood = b"x" * 60000

    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        async with egress(NAMED) as agent:
            flow = await agent.udp(HOST, sock.getsockname()[1])
            flow.send_nowait(b"go")
            _, peer = await sock.recvfrom(100)
            for _ in range(500):
                await sock.sendto(flood, peer)
                await trio.lowlevel.checkpoint()
            # Datagrams were lost, none is cut, and those that go out still do.
            assert await receive(flow) == flood
            flow.send_nowait(b"still")
            assert (await sock.recvfrom(100))[0] == b"still"


@given(st.lists(st.binary(max_size=200), max_size=10), st.integers(1, 50))
def test_datagrams_are_framed_in_any_chunking(datagrams: list[bytes], chunk: int) -> None:
    sent = b"".join(map(encode, datagrams))
    decoder = DatagramDecoder()
    got = []
    for start in range(0, len(sent), chunk):
        decoder.feed(sent[start : start + chunk])
        while (datagram := decoder.next()) is not None:
            got.append(datagram)
    assert got == datagrams


@given(st.binary(min_size=8, max_size=100))
def test_no_bytes_make_the_decoder_hold_more_than_a_datagram(data: bytes) -> None:
    decoder = DatagramDecoder()
    decoder.feed(data)
    try:
        while decoder.next() is not None:
            pass
    except WireError:
        return
    (length,) = struct.unpack("<I", data[:4])
    assert length <= 65507


# --- limits ---


async def test_connections_beyond_the_limit_are_refused_at_once_and_others_end() -> None:
    async with server(echo) as port, egress(NAMED.with_limits(connections=2)) as agent:
        events = agent.server.subscribe()
        first = await agent.tcp(HOST, port)
        second = await agent.udp(HOST, port)
        with pytest.raises(Refused) as refused:
            await agent.tcp(HOST, port)
        assert refused.value.errno == errno.EAGAIN
        assert "limit of 2" in decided(events)[-1].reason
        assert await exchange(first, b"x") == b"x"
        while agent.server._connections > 1:
            await trio.testing.wait_all_tasks_blocked()
        assert await exchange(await agent.tcp(HOST, port), b"y") == b"y"
        assert second.send_nowait(b"")
        # Names are still found while all places are taken.
        await agent.resolve(dns.message.make_query(HOST_NAME, "A").to_wire())


async def test_the_rate_of_all_connections_together_is_limited(
    autojump_clock: trio.testing.MockClock,
) -> None:
    rate = 100_000
    async with server(echo) as port, egress(NAMED.with_limits(bytes_per_second=rate)) as agent:
        start = trio.current_time()

        async def one() -> None:
            assert await exchange(await agent.tcp(HOST, port), bytes(100_000)) == bytes(100_000)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one)
        assert trio.current_time() - start >= (600_000 - rate / 8) / rate - 0.01


async def test_datagrams_beyond_the_rate_are_dropped(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with udp_echo() as port, egress(NAMED.with_limits(bytes_per_second=1000)) as agent:
        flow = await agent.udp(HOST, port)
        for n in range(10):
            flow.send_nowait(bytes([n]) * 1000)
            await trio.testing.wait_all_tasks_blocked()
        assert (await receive(flow))[0] == 0
        await trio.sleep(20)
        flow.send_nowait(b"later")
        got = await receive(flow)
        while got != b"later":
            got = await receive(flow)


# --- events ---


async def test_each_decision_is_an_event_and_the_feed_ends_with_the_server() -> None:
    async with server(echo) as port, egress(NAMED) as agent:
        events = agent.server.subscribe()
        await exchange(await agent.tcp(HOST, port), b"")
        with pytest.raises(Refused):
            await agent.udp("8.8.8.8", 53)
        await agent.resolve(dns.message.make_query("a.example", "TXT").to_wire())
    got = [(e.allowed, e.protocol, e.address, e.port, e.host) async for e in events]
    assert got == [
        (True, "tcp", HOST, port, None),
        (False, "udp", "8.8.8.8", 53, None),
        (False, "dns", None, 53, "a.example"),
    ]
    assert [e async for e in agent.server.subscribe()] == []


async def test_a_reader_that_sleeps_holds_nobody_up() -> None:
    async with egress(EgressPolicy.deny_all()) as agent:
        events = agent.server.subscribe(4)
        for _ in range(50):
            with pytest.raises(Refused):
                await agent.tcp("8.8.8.8", 80)
        got = decided(events)
        assert len(got) == 4
        assert sum(1 + event.missed for event in got) == 50


# --- hostile guests ---


async def test_ten_thousand_opens_that_nobody_reads_leave_the_server_able() -> None:
    async with server(echo) as port, egress(NAMED) as agent:
        limiter = trio.CapacityLimiter(64)
        refused = 0

        async def attack(n: int) -> None:
            nonlocal refused
            async with limiter:
                try:
                    stream = await agent.dial()
                    await stream.send_all(open_frame(TCP, "10.0.0.1", n % 65535 + 1))
                except (OSError, trio.BrokenResourceError):
                    refused += 1
                    return
            if n % 2:
                stream.abort()

        async with trio.open_nursery() as nursery:
            for n in range(10_000):
                nursery.start_soon(attack, n)
        await idle(agent)
        assert agent.server._undecided == 0
        assert not agent.host._streams
        assert await exchange(await agent.tcp(HOST, port), b"alive") == b"alive"


async def test_streams_that_say_nothing_are_bounded_and_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with egress(NAMED) as agent:
        silent = []
        for n in range(MAX_UNDECIDED + 20):
            try:
                stream = await agent.dial()
            except ConnectionRefusedError:  # so it looks when the reset comes at once
                assert n >= MAX_UNDECIDED
                continue
            if n % 3 == 1:
                await stream.send_all(open_frame(TCP, HOST, 1)[: n % 31])
            silent.append(stream)
        await trio.testing.wait_all_tasks_blocked()
        assert agent.server._undecided == MAX_UNDECIDED
        await trio.sleep(OPEN_TIMEOUT + 1)
        assert agent.server._undecided == 0
        for stream in silent:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            stream.abort()


async def test_resolver_connections_are_bounded() -> None:
    async with egress(NAMED) as agent:
        held = [await agent.tcp(RESOLVER, 53) for _ in range(MAX_RESOLVING)]
        with pytest.raises(Refused) as refused:
            await agent.tcp(RESOLVER, 53)
        assert refused.value.errno == errno.EAGAIN
        for stream in held:
            stream.abort()


def not_an_open(raw: bytes) -> bool:
    try:
        if raw.startswith(open_frame(TCP, HOST, 1)[:8]):
            return not wire.Open.decode(raw[8:32]).port
        return True
    except WireError:
        return True


garbage = st.one_of(
    st.binary(min_size=32, max_size=100),
    st.builds(
        lambda protocol, port, raw: (
            struct.pack("<IBBHII", 24, FrameType.OPEN, 0, 0, protocol, port) + raw
        ),
        st.sampled_from([0, 1, 6, 17, 132, 0xFFFFFFFF]),
        st.sampled_from([0, 65536, 0xFFFFFFFF]),
        st.binary(min_size=16, max_size=16),
    ),
    st.just(wire.frame(FrameType.EXEC, bytes(100))),
    st.just(struct.pack("<IBBH", 2 << 20, FrameType.OPEN, 0, 0) + bytes(24)),
).filter(not_an_open)


@settings(max_examples=30, deadline=None)
@given(st.lists(garbage, min_size=1, max_size=5))
def test_garbage_in_the_place_of_an_open_resets_that_connection_alone(raws: list[bytes]) -> None:
    async def main() -> None:
        async with server(echo) as port, egress(NAMED) as agent:
            for raw in raws:
                stream = await agent.dial()
                await stream.send_all(raw)
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
                stream.abort()
            assert await exchange(await agent.tcp(HOST, port), b"alive") == b"alive"

    trio.run(main)


@pytest.mark.parametrize("protocol", [TCP, UDP])
async def test_garbage_among_datagrams_and_questions_ends_that_flow_alone(
    protocol: wire.Protocol,
) -> None:
    async with udp_echo() as port, egress(NAMED) as agent:
        for address, number in ((HOST, port), (RESOLVER, 53)):
            if protocol is TCP and address == HOST:
                continue
            stream = await agent.open(protocol, address, number)
            await stream.send_all(b"\xff" * 3000)
            try:
                assert await stream.receive_some() == b""
            except trio.BrokenResourceError:
                pass
            stream.abort()
        flow = await agent.udp(HOST, port)
        flow.send_nowait(b"alive")
        assert await receive(flow) == b"alive"


async def test_a_guest_that_lies_about_its_credit_costs_one_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with egress(NAMED) as agent:
        host = agent.host.core
        opened = open_frame(TCP, "10.0.0.1", 80)

        async def say(port: int, op: Op, credit: int, forwarded: int, payload: bytes = b"") -> None:
            raw = pack_header(3, 2, port, PORT, len(payload), op, 0, credit, forwarded) + payload
            while raw:
                await trio.lowlevel.wait_writable(agent.channel)
                raw = raw[agent.channel.send(raw) :]

        for port, (credit, forwarded) in enumerate([(0, 0), (0, 0xFFFFFFFF), (0xFFFFFFFF, 7)], 5):
            await say(port, Op.REQUEST, credit, forwarded)
            await say(port, Op.RW, credit, forwarded, opened)
        await say(9, Op.REQUEST, 1 << 20, 0)
        for _ in range(20):  # more than its window
            await say(9, Op.RW, 1 << 20, 0, bytes(60000))
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(OPEN_TIMEOUT * 3)
        assert agent.server._undecided == 0
        assert agent.server._connections == 0
        assert not [c for c in host._connections.values() if c.state is State.OPEN]


async def test_the_machines_end_ends_the_server_quietly() -> None:
    async with server(echo) as port, egress(NAMED) as agent:
        stream = await agent.tcp(HOST, port)
        events = agent.server.subscribe()
        agent.host.close()
        assert [e async for e in events] == []
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


async def test_the_machines_end_ends_the_server_quietly_as_engines_tell_it() -> None:
    async with egress(NAMED) as agent:
        events = agent.server.subscribe()
        await trio.testing.wait_all_tasks_blocked()
        agent.host.close(lambda: VmExited("shutdown"))
        assert [e async for e in events] == []


@attrs.frozen
class Scene:
    """Everything at once, for cancellations."""

    agent: Agent
    tcp: int
    udp: int

    async def play(self) -> None:
        async with trio.open_nursery() as nursery:
            for step in (self.stream, self.refused, self.datagrams, self.names):
                nursery.start_soon(step)

    async def stream(self) -> None:
        await exchange(await self.agent.tcp(HOST, self.tcp), DATA)

    async def refused(self) -> None:
        with pytest.raises(Refused):
            await self.agent.tcp("10.0.0.1", 80)

    async def datagrams(self) -> None:
        flow = await self.agent.udp(HOST, self.udp)
        flow.send_nowait(b"x")
        assert await receive(flow) == b"x"

    async def names(self) -> None:
        await self.agent.resolve(dns.message.make_query("a.example", "A").to_wire())


@pytest.mark.parametrize("turns", [*range(0, 60, 2), 100, 200, 400])
async def test_a_cancellation_at_any_moment_leaves_no_socket(turns: int) -> None:
    trio.socket.set_custom_hostname_resolver(Hosts({"a.example": ["8.8.8.8"]}))
    async with server(echo) as tcp, udp_echo() as udp:
        before = len(open_files())
        with trio.CancelScope() as scope:
            policy = EgressPolicy.allow(hosts=[HOST_NAME, "a.example"])
            async with egress(policy) as agent, trio.open_nursery() as nursery:
                nursery.start_soon(Scene(agent, tcp, udp).play)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
                await trio.lowlevel.checkpoint()
        while len(open_files()) > before:  # the echo server's ends of what was cut
            await trio.testing.wait_all_tasks_blocked()
