"""The resolver answers what the policy allows, and survives what a guest may ask."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any

import attrs
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
import trio
import trio.lowlevel
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.net import dnsmessage
from trio_supermachine.net.addresses import HOST_NAME
from trio_supermachine.net.decisions import Decision
from trio_supermachine.net.lookup import HostLookups, read_name_servers
from trio_supermachine.net.names import ToldNames
from trio_supermachine.net.nameserver import MAX_RECORDS
from trio_supermachine.net.policy import EgressPolicy
from trio_supermachine.net.resolver import MAX_TOLD, TTL, Resolver

PUBLIC = "93.184.216.34"
PUBLIC6 = "2606:2800:21f::1"
METADATA = "169.254.169.254"


class Hosts(trio.abc.HostnameResolver):
    """The host's resolver, with a table that tests may change."""

    def __init__(self, table: dict[str, Sequence[str]]) -> None:
        self.table = table
        self.asked: list[str] = []
        self.at_once = 0
        self.most = 0
        self.silent = False

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: Any,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> Any:
        assert host is not None
        name = host.decode()
        self.asked.append(name)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            if self.silent:
                await trio.sleep_forever()
            await trio.lowlevel.checkpoint()
        finally:
            self.at_once -= 1
        if name not in self.table:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if not self.table[name]:
            raise socket.gaierror(socket.EAI_NODATA, "No address associated with hostname")
        return [
            (socket.AF_INET6 if ":" in text else socket.AF_INET, type, 6, "", (text, 0))
            for text in self.table[name]
        ]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        await trio.lowlevel.checkpoint()
        for name, texts in self.table.items():
            if sockaddr[0] in texts:
                return name, "0"
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@attrs.frozen
class Desk:
    """A resolver, what it told, and what it said of that."""

    resolver: Resolver
    names: ToldNames
    hosts: Hosts
    said: list[tuple[bool, str]]

    async def ask(
        self, name: str, kind: str = "A", *, datagram: bool = True, **options: Any
    ) -> dns.message.Message:
        query = dns.message.make_query(name, kind, **options)
        wire = await self.resolver.answer(query.to_wire(), datagram=datagram)
        assert wire is not None
        answer = dns.message.from_wire(wire)
        assert query.is_response(answer)
        return answer

    async def addresses(self, name: str, kind: str = "A") -> list[str]:
        answer = await self.ask(name, kind)
        assert answer.rcode() == dns.rcode.NOERROR
        return [record.to_text() for rrset in answer.answer for record in rrset]

    def listed(self, address: str) -> bool:
        return self.names.listed(ip_address(address), trio.current_time())


def desk(
    policy: EgressPolicy,
    table: Mapping[str, Sequence[str]] | None = None,
    lookups: HostLookups | None = None,
) -> Desk:
    hosts = Hosts(dict(table or {}))
    trio.socket.set_custom_hostname_resolver(hosts)
    said: list[tuple[bool, str]] = []

    def report(decision: Decision, name: str) -> None:
        said.append((decision.allowed, name))

    names = ToldNames()
    return Desk(Resolver(policy, names, lookups or HostLookups(), report), names, hosts, said)


async def test_addresses_come_from_the_hosts_resolver_by_family() -> None:
    it = desk(EgressPolicy.deny_private(), {"a.example": [PUBLIC, PUBLIC6, "1.1.1.1"]})
    assert await it.addresses("a.example") == [PUBLIC, "1.1.1.1"]
    assert await it.addresses("A.Example.", "AAAA") == [PUBLIC6]
    answer = await it.ask("a.example")
    assert answer.answer[0].ttl == TTL
    assert answer.flags & dns.flags.RA
    assert it.said == [(True, "a.example")] * 3


async def test_what_does_not_exist_and_what_has_no_address_are_told_apart() -> None:
    it = desk(EgressPolicy.deny_private(), {"v4.example": [PUBLIC], "empty.example": []})
    assert await it.addresses("v4.example", "AAAA") == []
    assert await it.addresses("empty.example") == []
    assert (await it.ask("no.example")).rcode() == dns.rcode.NXDOMAIN


async def test_a_name_that_the_policy_does_not_list_is_refused_and_never_looked_up() -> None:
    it = desk(
        EgressPolicy.allow(hosts=["a.example"]), {"a.example": [PUBLIC], "b.example": ["1.1.1.1"]}
    )
    assert await it.addresses("a.example") == [PUBLIC]
    answer = await it.ask("b.example", use_edns=0)
    assert answer.rcode() == dns.rcode.REFUSED
    assert "does not list" in answer.extended_errors()[0].to_text()
    assert it.hosts.asked == ["a.example"]
    assert it.said == [(True, "a.example"), (False, "b.example")]
    assert it.listed(PUBLIC)
    assert not it.listed("1.1.1.1")


@pytest.mark.parametrize(
    "policy",
    [
        EgressPolicy.deny_private(),
        EgressPolicy.allow_all(),
        EgressPolicy.deny(cidrs=["10.0.0.0/8"]),
        EgressPolicy.allow(hosts=["evil.example"], cidrs=["0.0.0.0/0", "::/0"]),
    ],
    ids=str,
)
async def test_no_name_leads_to_the_hosts_loopback_or_to_metadata(policy: EgressPolicy) -> None:
    bad = ["127.0.0.1", "127.9.9.9", "0.0.0.0", METADATA, "100.100.100.200", "168.63.129.16"]
    bad6 = ["::1", "::", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "fd00:ec2::254", "fe80::1%eth0"]
    it = desk(policy, {"evil.example": [*bad, *bad6, PUBLIC]})
    assert await it.addresses("evil.example") == [PUBLIC]
    assert await it.addresses("evil.example", "AAAA") == []
    assert it.said == [(True, "evil.example"), (False, "evil.example")]
    for text in bad:
        assert it.names.name(ip_address(text), trio.current_time()) is None


async def test_private_answers_are_told_only_where_the_policy_has_their_network() -> None:
    table = {"db.corp": ["10.1.2.3", "10.9.9.9"]}
    assert await desk(EgressPolicy.deny_private(), table).addresses("db.corp") == []
    assert await desk(EgressPolicy.allow(hosts=["db.corp"]), table).addresses("db.corp") == []
    it = desk(EgressPolicy.allow(hosts=["db.corp"], cidrs=["10.1.0.0/16"]), table)
    assert await it.addresses("db.corp") == ["10.1.2.3"]
    assert it.listed("10.1.2.3")
    assert not it.listed("10.9.9.9")
    it = desk(EgressPolicy.deny(cidrs=["10.9.0.0/16"]), table)
    assert await it.addresses("db.corp") == ["10.1.2.3"]


async def test_a_name_that_changes_its_address_leads_to_what_was_told_and_nowhere_else() -> None:
    it = desk(EgressPolicy.allow(hosts=["a.example"]), {"a.example": [PUBLIC]})
    assert await it.addresses("a.example") == [PUBLIC]
    it.hosts.table["a.example"] = [METADATA, "10.0.0.1", "192.168.0.1"]
    assert await it.addresses("a.example") == []
    assert it.listed(PUBLIC)
    for text in (METADATA, "10.0.0.1", "192.168.0.1"):
        assert not it.listed(text)


async def test_what_was_told_is_held_for_its_ttl_and_a_minute(
    autojump_clock: trio.testing.MockClock,
) -> None:
    it = desk(EgressPolicy.allow(hosts=["a.example"]), {"a.example": [PUBLIC]})
    await it.addresses("a.example")
    await trio.sleep(TTL + 59)
    assert it.listed(PUBLIC)
    await trio.sleep(2)
    assert not it.listed(PUBLIC)


async def test_the_host_has_its_name_in_policies_that_name_it() -> None:
    it = desk(EgressPolicy.allow(hosts=[HOST_NAME], ports=[80]))
    assert await it.addresses(HOST_NAME) == ["192.0.0.3"]
    assert await it.addresses(HOST_NAME, "AAAA") == ["fd73:6d00::3"]
    assert await it.addresses(HOST_NAME, "TXT") == []
    for reverse in (
        "3.0.0.192.in-addr.arpa",
        dns.name.from_text("3." + "0." * 23 + "0.0.d.6.3.7.d.f.ip6.arpa").to_text(),
    ):
        assert await it.addresses(reverse, "PTR") == [HOST_NAME + "."]
    assert not it.hosts.asked


@pytest.mark.parametrize(
    "policy",
    [EgressPolicy.deny_private(), EgressPolicy.allow_all(), EgressPolicy.deny_all()],
    ids=str,
)
async def test_in_others_it_has_none(policy: EgressPolicy) -> None:
    it = desk(policy, {HOST_NAME: [PUBLIC]})
    assert (await it.ask(HOST_NAME)).rcode() == dns.rcode.REFUSED
    assert (await it.ask("3.0.0.192.in-addr.arpa", "PTR")).rcode() == dns.rcode.REFUSED
    assert not it.hosts.asked


async def test_names_beside_the_hosts_own_are_not_looked_up() -> None:
    it = desk(EgressPolicy.allow_all(), {"x.supermachine.internal": [PUBLIC]})
    assert (await it.ask("x.supermachine.internal")).rcode() == dns.rcode.NXDOMAIN
    assert not it.hosts.asked


@pytest.mark.parametrize(
    "name",
    [
        "127.1",
        "10.0.0.1",
        "0x7f000001",
        "2130706433",
        "a.0x7f",
        r"evil\.example",
        r"a\000b.example",
        r"a\032b.example",
        r"\255.example",
        "-a.example",
    ],
)
async def test_what_is_no_host_name_is_never_looked_up(name: str) -> None:
    it = desk(EgressPolicy.allow_all(), {name: [PUBLIC], "evil.example": [PUBLIC]})
    assert (await it.ask(name)).rcode() == dns.rcode.NXDOMAIN
    assert not it.hosts.asked


async def test_reverse_names_are_told_of_addresses_that_may_be_told() -> None:
    table = {"a.example": [PUBLIC], "db.corp": ["10.0.0.1"]}
    it = desk(EgressPolicy.deny_private(), table)
    assert await it.addresses("34.216.184.93.in-addr.arpa", "PTR") == ["a.example."]
    assert (await it.ask("1.0.0.10.in-addr.arpa", "PTR")).rcode() == dns.rcode.REFUSED
    assert (await it.ask("1.0.0.127.in-addr.arpa", "PTR")).rcode() == dns.rcode.NXDOMAIN
    assert (await it.ask("8.8.8.8.in-addr.arpa", "PTR")).rcode() == dns.rcode.NXDOMAIN
    it = desk(EgressPolicy.allow(hosts=["a.example"]), table)
    assert (await it.ask("34.216.184.93.in-addr.arpa", "PTR")).rcode() == dns.rcode.REFUSED
    await it.addresses("a.example")
    assert await it.addresses("34.216.184.93.in-addr.arpa", "PTR") == ["a.example."]


# --- what does not fit, and what takes too long ---

MANY = [f"8.8.{n // 200}.{n % 200 + 1}" for n in range(200)]


@pytest.mark.parametrize(("options", "most"), [({}, 512), ({"use_edns": 0, "payload": 4096}, 1232)])
async def test_an_answer_too_long_for_a_datagram_is_truncated(
    options: dict[str, Any], most: int
) -> None:
    it = desk(EgressPolicy.deny_private(), {"a.example": MANY})
    query = dns.message.make_query("a.example", "A", **options)
    wire = await it.resolver.answer(query.to_wire(), datagram=True)
    assert wire is not None
    assert len(wire) <= most
    answer = dns.message.from_wire(wire)
    assert answer.flags & dns.flags.TC
    assert not answer.answer
    whole = await it.ask("a.example", datagram=False, **options)
    assert len(whole.answer[0]) == 200
    assert not whole.flags & dns.flags.TC


async def test_a_silent_resolver_is_a_servfail_after_five_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    it = desk(EgressPolicy.deny_private())
    it.hosts.silent = True
    assert (await it.ask("a.example")).rcode() == dns.rcode.SERVFAIL
    assert trio.current_time() == pytest.approx(5, abs=0.5)
    assert not it.hosts.at_once
    assert it.said == [(True, "a.example")]


async def test_the_hosts_real_resolver_is_asked_in_a_thread_and_its_loopback_not_told() -> None:
    it = desk(EgressPolicy.allow_all())
    trio.socket.set_custom_hostname_resolver(None)
    assert await it.addresses("localhost") == []
    assert await it.addresses("localhost", "AAAA") == []
    assert it.said == [(False, "localhost")] * 2 or it.said[0] == (False, "localhost")


async def test_a_lookup_that_is_given_up_leaves_its_thread_counted_and_alone() -> None:
    lookups = HostLookups()
    release = threading.Event()
    for _ in range(20):
        with trio.move_on_after(0.01):
            await lookups._in_thread(release.wait)
    assert lookups._threads.borrowed_tokens == 8
    assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
    release.set()
    while lookups._threads.borrowed_tokens:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("kind", ["A", "PTR", "TXT"])
async def test_where_the_host_has_no_thread_left_there_is_a_servfail(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def start(*args: object, **kwargs: object) -> None:
        raise RuntimeError("can't start new thread")

    it = desk(EgressPolicy.allow_all())
    trio.socket.set_custom_hostname_resolver(None)
    # What the system says cannot be had here without taking the threads of other tests, too.
    monkeypatch.setattr("trio._threads.start_thread_soon", start)
    name = "4.3.2.1.in-addr.arpa" if kind == "PTR" else "a.example"
    assert (await it.ask(name, kind)).rcode() == dns.rcode.SERVFAIL


async def test_of_a_hostile_name_servers_thousands_of_addresses_a_few_are_looked_at() -> None:
    many = [f"93.184.{i // 256}.{i % 256}" for i in range(4000)]
    it = desk(EgressPolicy.deny_private(), {"many.example": many})
    answer = await it.ask("many.example", datagram=False)
    assert len(answer.answer[0]) == MAX_TOLD
    assert len(it.names) == MAX_TOLD


# --- other types ---


@asynccontextmanager
async def name_server(answers: dict[str, list[str]]) -> AsyncIterator[tuple[str, int]]:
    """A name server on UDP and TCP that knows ``answers``: text of records by name and type."""

    def answer(wire: bytes) -> dns.message.Message:
        query = dns.message.from_wire(wire)
        reply = dns.message.make_response(query)
        asked = query.question[0]
        key = f"{asked.name} {dns.rdatatype.to_text(asked.rdtype)}"
        if key not in answers:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        for text in answers.get(key, []):
            name, kind, value = text.split(" ", 2)
            reply.answer.append(dns.rrset.from_text(name, 300, "IN", kind, value))
        reply.additional.append(dns.rrset.from_text("evil.example.", 300, "IN", "A", "10.0.0.1"))
        return reply

    async def datagrams() -> None:
        while True:
            wire, peer = await udp.recvfrom(4096)
            reply = answer(wire)
            if sum(len(rrset) for rrset in reply.answer) > 5:
                reply.answer.clear()
                reply.flags |= dns.flags.TC
            await udp.sendto(b"garbage", peer)
            await udp.sendto(reply.to_wire(), peer)

    async def stream(client: trio.SocketStream) -> None:
        async with client:
            head = await client.receive_some(2)
            wire = await client.receive_some(struct.unpack("!H", head)[0])
            if b"reset" in wire:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            if b"empty" in wire:
                return
            if b"nonsense" in wire:
                await client.send_all(b"\x00\x20" + b"\xff" * 32)
                return
            reply = answer(wire).to_wire(max_size=65535)
            await client.send_all(struct.pack("!H", len(reply)) + reply)

    while True:  # until a free port of UDP is one of TCP, too
        udp = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await udp.bind(("127.0.0.1", 0))
        port = udp.getsockname()[1]
        try:
            listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
            break
        except OSError:
            udp.close()
    with udp:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(datagrams)
            await nursery.start(trio.serve_listeners, stream, listeners)
            yield "127.0.0.1", port
            nursery.cancel_scope.cancel()


def asking(*servers: tuple[str, int]) -> HostLookups:
    async def name_servers() -> Sequence[tuple[str, int]]:
        await trio.lowlevel.checkpoint()
        return servers

    return HostLookups(name_servers)


async def test_other_types_are_forwarded_to_the_hosts_name_servers() -> None:
    answers = {
        "a.example. MX": ["a.example. MX 10 mail.a.example."],
        "big.example. TXT": [f'big.example. TXT "{"x" * 200}{n}"' for n in range(20)],
        "empty.example. TXT": [],
        "alias.example. SRV": ["alias.example. CNAME b.example.", "b.example. A 10.0.0.1"],
    }
    async with name_server(answers) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dead:
            dead.bind(("127.0.0.1", 0))
            closed = dead.getsockname()
        it = desk(EgressPolicy.deny_private(), lookups=asking(closed, server))
        answer = await it.ask("a.example", "MX")
        assert [r.to_text() for r in answer.answer[0]] == ["10 mail.a.example."]
        assert not answer.additional
        answer = await it.ask("big.example", "TXT", datagram=False)
        assert len(answer.answer[0]) == 20
        assert (await it.ask("empty.example", "TXT")).rcode() == dns.rcode.NOERROR
        assert (await it.ask("no.example", "TXT")).rcode() == dns.rcode.NXDOMAIN
        answer = await it.ask("alias.example", "SRV")
        assert [rrset.rdtype for rrset in answer.answer] == [dns.rdatatype.CNAME]
        assert not it.hosts.asked


@pytest.mark.parametrize(
    ("count", "text"), [(MAX_RECORDS - 20, "x"), (MAX_RECORDS + 1, "x"), (40, "x" * 250)]
)
async def test_of_answers_no_more_is_parsed_than_takes_a_moment(count: int, text: str) -> None:
    answers = {"a.example. TXT": [f'a.example. TXT "{text}{n}"' for n in range(count)]}
    async with name_server(answers) as server:
        it = desk(EgressPolicy.deny_private(), lookups=asking(server))
        answer = await it.ask("a.example", "TXT", datagram=False)
        if count < MAX_RECORDS and len(text) == 1:
            assert len(answer.answer[0]) == count
        else:
            assert answer.rcode() == dns.rcode.SERVFAIL


async def test_the_program_goes_on_while_the_worst_answer_is_parsed() -> None:
    deep = ".".join("abcdefghij" * 11) + ".a.example."
    answers = {"a.example. MX": [f"{deep} MX {n} {deep}" for n in range(100)]}
    turns = 0
    async with name_server(answers) as server, trio.open_nursery() as nursery:
        it = desk(EgressPolicy.deny_private(), lookups=asking(server))

        async def count() -> None:
            nonlocal turns
            while True:
                await trio.sleep(0.001)
                turns += 1

        async def ask() -> None:
            while True:  # on a busy host an attempt may end before its answer comes
                await it.ask("a.example", "MX")

        nursery.start_soon(count)
        parsing = it.resolver._lookups._parsing
        async with parsing:  # the answer waits to be parsed
            nursery.start_soon(ask)
            while not parsing.statistics().tasks_waiting:
                await trio.lowlevel.checkpoint()
        turns = 0
        while parsing.borrowed_tokens:
            await trio.lowlevel.checkpoint()
        assert turns
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["reset.example", "empty.example", "nonsense.example"])
async def test_a_name_server_that_breaks_off_is_a_servfail(name: str) -> None:
    answers = {f"{name}. TXT": [f'{name}. TXT "{n}"' for n in range(20)]}  # too long for UDP
    async with name_server(answers) as server:
        it = desk(EgressPolicy.deny_private(), lookups=asking(server))
        assert (await it.ask(name, "TXT")).rcode() == dns.rcode.SERVFAIL


async def test_other_types_have_the_same_policy() -> None:
    async with name_server({}) as server:
        it = desk(EgressPolicy.allow(hosts=["a.example"]), lookups=asking(server))
        assert (await it.ask("b.example", "TXT")).rcode() == dns.rcode.REFUSED
        assert (await it.ask("a.example", "TXT")).rcode() == dns.rcode.NXDOMAIN
        assert it.said == [(False, "b.example"), (True, "a.example")]


async def test_without_a_name_server_that_answers_there_is_a_servfail() -> None:
    it = desk(EgressPolicy.deny_private(), lookups=asking())
    assert (await it.ask("a.example", "MX")).rcode() == dns.rcode.SERVFAIL


def test_name_servers_are_read_as_resolv_conf_has_them() -> None:
    text = "# c\nnameserver 10.0.0.1\nnameserver  fe80::1%eth0 \nnameserver bad\nnameserver"
    assert read_name_servers(text) == [("10.0.0.1", 53), ("fe80::1%eth0", 53)]
    assert len(read_name_servers("nameserver 1.1.1.1\n" * 9)) == 3


# --- hostile questions ---

header = st.tuples(
    st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), *(st.integers(0, 3) for _ in range(4))
).map(lambda fields: struct.pack("!HHHHHH", *fields))
queries = st.one_of(
    st.binary(max_size=80),
    st.tuples(header, st.binary(max_size=80)).map(b"".join),
    st.tuples(
        st.sampled_from(
            [
                dns.message.make_query("a.example", kind, use_edns=0).to_wire()
                for kind in ("A", "PTR", "ANY", "TSIG", "AXFR", "TYPE65280")
            ]
        ),
        st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
        st.binary(max_size=20),
    ).map(lambda t: mutated(*t)),
)


def mutated(wire: bytes, changes: list[tuple[int, int]], more: bytes) -> bytes:
    changed = bytearray(wire)
    for place, value in changes:
        changed[place % len(changed)] = value
    return bytes(changed) + more


@given(queries)
def test_any_bytes_are_a_question_or_refused_or_dropped(wire: bytes) -> None:
    read = dnsmessage.read(wire)
    if isinstance(read, bytes):
        assert read[:2] == wire[:2]
        answer = dns.message.from_wire(read)
        assert answer.flags & dns.flags.QR
        assert answer.rcode() in (dns.rcode.FORMERR, dns.rcode.NOTIMP, dns.rcode.REFUSED)
    elif read is None:
        assert len(wire) < 12 or wire[2] & 0x80
    else:
        reply = dnsmessage.reply(read, dns.rcode.SERVFAIL, "why")
        for datagram in (True, False):
            packed = dnsmessage.pack(reply, read, datagram=datagram)
            assert packed[:2] == wire[:2]
            assert read.message.is_response(dns.message.from_wire(packed))


def test_records_in_a_question_are_refused_before_they_are_parsed() -> None:
    query = dns.message.make_query("a.example", "A")
    for section in (query.answer, query.authority):
        section.append(dns.rrset.from_text("a.example.", 1, "IN", "MX", "1 b.example."))
        answer = dnsmessage.read(query.to_wire())
        assert isinstance(answer, bytes)
        assert dns.message.from_wire(answer).rcode() == dns.rcode.FORMERR
        section.clear()
    assert isinstance(dnsmessage.read(query.to_wire()), dnsmessage.Question)


async def test_strange_queries_are_refused() -> None:
    it = desk(EgressPolicy.allow_all())

    async def rcode(message: dns.message.Message) -> dns.rcode.Rcode:
        wire = await it.resolver.answer(message.to_wire(), datagram=True)
        assert wire is not None
        return dns.message.from_wire(wire).rcode()

    query = dns.message.make_query
    assert await rcode(query("version.bind", "TXT", "CH")) == dns.rcode.REFUSED
    assert await rcode(query("a.example", "ANY")) == dns.rcode.REFUSED
    assert await rcode(query("a.example", "AXFR")) == dns.rcode.REFUSED
    two = query("a.example", "A")
    two.question.append(two.question[0])
    assert await rcode(two) == dns.rcode.FORMERR
    none = query("a.example", "A")
    none.question.clear()
    assert await rcode(none) == dns.rcode.FORMERR
    response = dns.message.make_response(query("a.example", "A"))
    assert await it.resolver.answer(response.to_wire(), datagram=True) is None
    long = query("a.example", "A").to_wire() + bytes(2000)
    answer = await it.resolver.answer(long, datagram=True)
    assert answer is not None
    assert dns.message.from_wire(answer).rcode() == dns.rcode.FORMERR
    assert not it.hosts.asked
