"""Policies say what a guest may reach, and what none of them lets it reach."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import (
    IPv4Address,
    IPv6Address,
    ip_address,
    ip_network,
)
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.errors import ConfigError
from trio_supermachine.net import addresses as a
from trio_supermachine.net.addresses import Address, Network, is_metadata, is_never, is_public
from trio_supermachine.net.decisions import (
    decide,
    decide_answer,
    decide_name,
    lists_name,
)
from trio_supermachine.net.events import EgressEvent, EventFeed
from trio_supermachine.net.names import GRACE, ToldNames
from trio_supermachine.net.policy import EgressPolicy, PolicyKind
from trio_supermachine.net.rate import TokenBucket

HOST = "host.supermachine.internal"

PUBLIC = """
    1.1.1.1 8.8.8.8 93.184.216.34 11.0.0.0 172.15.255.255 172.32.0.0 192.167.255.255 192.169.0.0
    100.63.255.255 100.128.0.0 169.253.255.255 169.255.0.0 192.0.0.9 192.0.0.10 192.0.1.0
    192.31.196.1 192.52.193.1 192.175.48.1 198.17.255.255 198.20.0.0 223.255.255.255
    2606:4700:4700::1111 2001:4860:4860::8888 2001:1::1 2001:1::2 2001:1::3 2001:3::1
    2001:4:112::1 2001:20::1 2001:30::1 2001:200::1 2620:4f:8000::1 2a00::1 3ffe::1
    64:ff9b::808:808 2002:808:808::1 2001:0:808:808:0:0:f7f7:f7f7
"""
PRIVATE = """
    0.0.0.0 0.1.2.3 10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 127.0.0.1 127.255.255.255
    169.254.0.1 169.254.169.254 172.16.0.0 172.31.255.255 192.0.0.1 192.0.0.170 192.0.0.192
    192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1
    224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 100.100.100.200 168.63.129.16
    :: ::1 ::7f00:1 ::808:808 ::ffff:0:808:808 64:ff9b:1::808:808 100::1 100:0:0:1::1
    2001:2::1 2001:10::1 2001:100::1 2001:1ff:ffff::1 2001:db8::1 3fff::1 5f00::1 4000::1
    fc00::1 fd00:ec2::254 fd20:ce::254 fd73:6d00::3 fe80::1 fec0::1 ff02::1 e000::1
    64:ff9b::a00:1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 2002:7f00:1::1 2002:a9fe:a9fe::
    2001:0:a00:1:0:0:f7f7:f7f7 2001:0:808:808:0:0:f5ff:fffe 64:ff9b::a83f:8110
"""


@pytest.mark.parametrize("text", PUBLIC.split())
def test_globally_reachable_addresses_are_public(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize("text", PRIVATE.split())
def test_all_others_are_private(text: str) -> None:
    assert not is_public(a.unmapped(ip_address(text)))


v4 = st.one_of(
    st.ip_addresses(v=4),
    st.sampled_from([ip_address(t) for t in (PUBLIC + PRIVATE).split() if ":" not in t]),
)
v6 = st.one_of(
    st.ip_addresses(v=6),
    st.sampled_from([ip_address(t) for t in (PUBLIC + PRIVATE).split() if ":" in t]),
)
any_address = st.one_of(v4, v6).map(a.unmapped)


@given(v4)
def test_an_embedded_address_is_as_public_as_it_is_by_itself(inner: IPv4Address) -> None:
    number = int(inner)
    server = int(IPv4Address("8.8.8.8"))
    for value in (
        int(IPv6Address("64:ff9b::")) | number,
        int(IPv6Address("2002::")) | number << 80 | 1,
        int(IPv6Address("2001::")) | server << 64 | (number ^ 0xFFFF_FFFF),
        int(IPv6Address("2001::")) | number << 64 | (server ^ 0xFFFF_FFFF),
    ):
        assert is_public(IPv6Address(value)) == is_public(inner)
        assert is_never(IPv6Address(value)) == is_never(inner)
        assert is_metadata(IPv6Address(value)) == is_metadata(inner)
    assert a.unmapped(IPv6Address(f"::ffff:{inner}")) == inner


@given(any_address)
def test_nothing_public_is_for_metadata_or_never_reached(address: Address) -> None:
    if is_public(address):
        assert not is_never(address)
        assert not is_metadata(address)


def test_the_hosts_own_addresses_are_known() -> None:
    assert a.is_own(ip_address("127.0.0.1"))
    assert a.is_own(ip_address("127.3.2.1"))  # a range that is local as a whole
    assert not a.is_own(ip_address("2001:db8::7"))
    assert not a.is_own(ip_address("203.0.113.77"))


# --- policies as text ---

label = st.text("abcxyz059", min_size=1, max_size=4).map("l{}".format)
name = st.lists(label, min_size=1, max_size=3).map(".".join)
host = st.one_of(name, name.map("*.{}".format), st.just(HOST))
cidr = st.one_of(
    st.builds(
        lambda address, bits: ip_network(f"{address}/{bits}", strict=False),
        st.one_of(st.ip_addresses(v=4)),
        st.integers(0, 32),
    ),
    st.builds(
        lambda address, bits: ip_network(f"{address}/{bits}", strict=False),
        st.ip_addresses(v=6),
        st.integers(0, 128),
    ),
)
lists: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "hosts": st.lists(host, max_size=3),
        "cidrs": st.lists(cidr, max_size=3),
        "ports": st.lists(st.integers(1, 65535), max_size=3),
    }
)
policies = st.one_of(
    st.sampled_from([EgressPolicy.allow_all, EgressPolicy.deny_all, EgressPolicy.deny_private]).map(
        lambda make: make()
    ),
    lists.map(lambda values: EgressPolicy.allow(**values)),
    lists.map(lambda values: EgressPolicy.deny(**values)),
)


@given(policies)
def test_a_policy_is_what_its_text_says(policy: EgressPolicy) -> None:
    assert EgressPolicy.parse(str(policy)) == policy


def test_texts() -> None:
    parse = EgressPolicy.parse
    assert parse(" deny_private ") == EgressPolicy.deny_private()
    assert parse("denylist:10.0.0.0/8, fd00::/8") == EgressPolicy.deny(
        cidrs=["10.0.0.0/8", "fd00::/8"]
    )
    assert parse("allowlist:1.2.3.4,::1") == EgressPolicy.allow(cidrs=["1.2.3.4/32", "::1/128"])
    assert parse("allowlist:Example.ORG.,*.a.b,:443") == EgressPolicy.allow(
        hosts=["example.org", "*.a.b"], ports=[443]
    )
    assert EgressPolicy.allow(cidrs=["::ffff:10.0.0.0/104"]).cidrs == (ip_network("10.0.0.0/8"),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "allow",
        "allow_all:",
        "deny_all:10.0.0.0/8",
        "allowlist",
        "allowlist:",
        "denylist: ",
        "denylist:10.0.0.0/8,",
        "denylist:10.0.0.1/8",
        "allowlist:10.0.0.0/33",
        "allowlist:1.2.3",
        "allowlist:0x7f.1",
        "allowlist:127.1",
        "allowlist::0",
        "allowlist::65536",
        "allowlist:*",
        "allowlist:*.*.a",
        "allowlist:a..b",
        "allowlist:-a",
        "allowlist:bücher.example",
        "allowlist:a b",
    ],
)
def test_nonsense_is_refused_with_what_was_wrong(text: str) -> None:
    with pytest.raises(ConfigError, match="egress policy"):
        EgressPolicy.parse(text)


@pytest.mark.parametrize("item", ["example.org:443", "10.0.0.1:443", "[::1]:443"])
def test_a_host_with_a_port_is_refused_with_how_to_write_it(item: str) -> None:
    with pytest.raises(ConfigError, match=r"list them apart, as .*,:443"):
        EgressPolicy.parse("allowlist:" + item)


@given(st.text(max_size=30))
def test_any_text_is_a_policy_or_a_config_error(text: str) -> None:
    for prefix in ("", "allowlist:", "denylist:"):
        try:
            policy = EgressPolicy.parse(prefix + text)
        except ConfigError:
            continue
        assert EgressPolicy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    "make",
    [
        lambda: EgressPolicy.allow(hosts="example.org"),
        lambda: EgressPolicy.allow(hosts=[1]),  # type: ignore[list-item]
        lambda: EgressPolicy.allow(hosts=["10.0.0.1"]),
        lambda: EgressPolicy.allow(cidrs="10.0.0.0/8"),
        lambda: EgressPolicy.allow(cidrs=[10]),  # type: ignore[list-item]
        lambda: EgressPolicy.allow(cidrs=5),  # type: ignore[arg-type]
        lambda: EgressPolicy.allow(ports=[0]),
        lambda: EgressPolicy.allow(ports=[True]),
        lambda: EgressPolicy.allow(ports=[65536]),
        lambda: EgressPolicy(kind="allow_all"),  # type: ignore[arg-type]
        lambda: EgressPolicy(kind=PolicyKind.ALLOW),
        lambda: EgressPolicy(kind=PolicyKind.DENY_ALL, ports=[1]),
        lambda: EgressPolicy.allow_all().with_limits(connections=-1),
        lambda: EgressPolicy.allow_all().with_limits(connections=100_000),
        lambda: EgressPolicy.allow_all().with_limits(bytes_per_second=0),
        lambda: EgressPolicy.allow_all().with_limits(bytes_per_second=1.5),  # type: ignore[arg-type]
        lambda: EgressPolicy.parse(None),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_value_is_refused_where_it_is_written(make: Callable[[], EgressPolicy]) -> None:
    with pytest.raises((ConfigError, TypeError)):
        make()


def test_an_empty_list_allows_nothing_and_denies_nothing() -> None:
    assert EgressPolicy.allow() == EgressPolicy.deny_all()
    assert EgressPolicy.deny() == EgressPolicy.allow_all()


def test_limits_are_part_of_a_copy() -> None:
    limited = EgressPolicy.deny_private().with_limits(connections=3, bytes_per_second=1000)
    assert (limited.connections, limited.bytes_per_second) == (3, 1000)
    assert EgressPolicy.deny_private().connections == 512
    assert EgressPolicy.deny_private().bytes_per_second is None
    assert str(limited) == "deny_private"


# --- decisions ---


def own_none(address: Address) -> bool:
    return False


def own_all(address: Address) -> bool:
    return True


port = st.integers(1, 65535)


@given(policies, any_address, port, st.booleans())
def test_no_policy_sends_anything_to_loopback_multicast_or_nowhere(
    policy: EgressPolicy, address: Address, port: int, listed: bool
) -> None:
    if is_never(address) and not a.is_host(address):
        assert not decide(policy, address, port, listed=listed, own=own_none).allowed


@given(policies, any_address)
def test_no_name_leads_to_loopback_or_metadata(policy: EgressPolicy, address: Address) -> None:
    if is_never(address) or is_metadata(address):
        assert not decide_answer(policy, address, own=own_none).allowed


@given(policies, st.sampled_from([a.HOST4, a.HOST6]), port, st.booleans())
def test_the_hosts_loopback_is_reached_only_by_a_policy_that_names_it(
    policy: EgressPolicy, address: Address, port: int, listed: bool
) -> None:
    named = policy.kind is PolicyKind.ALLOW and HOST in policy.hosts
    expected = named and (not policy.ports or port in policy.ports)
    assert decide(policy, address, port, listed=listed, own=own_none).allowed == expected
    assert decide_name(policy, HOST).allowed == named


@given(any_address, port, st.booleans())
def test_deny_private_is_the_public_internet_without_the_host_itself(
    address: Address, port: int, listed: bool
) -> None:
    policy = EgressPolicy.deny_private()
    assert decide(policy, address, port, listed=listed, own=own_none).allowed == is_public(address)
    assert not decide(policy, address, port, listed=listed, own=own_all).allowed
    assert decide_answer(policy, address, own=own_none).allowed == is_public(address)


@given(lists, any_address, port, st.booleans(), st.booleans())
def test_allow_is_what_is_listed_and_nothing_else(
    values: dict[str, Any], address: Address, port: int, listed: bool, own: bool
) -> None:
    policy = EgressPolicy.allow(**values)
    networks: list[Network] = values["cidrs"]
    listed = listed and bool(values["hosts"])
    inside = any(address in a.unmapped_network(n) for n in networks)
    public = is_public(address) and not own
    if values["hosts"] or values["cidrs"]:
        expected = inside or (listed and public)
    else:
        expected = bool(values["ports"]) and public
    expected = expected and (not values["ports"] or port in values["ports"])
    if is_never(address):
        return
    assert decide(policy, address, port, listed=listed, own=lambda _: own).allowed == expected


@given(lists, any_address, port, st.booleans())
def test_deny_is_everything_but_what_is_listed(
    values: dict[str, Any], address: Address, port: int, listed: bool
) -> None:
    policy = EgressPolicy.deny(**values)
    networks: list[Network] = values["cidrs"]
    listed = listed and bool(values["hosts"])
    ruled = listed or any(address in a.unmapped_network(n) for n in networks)
    if not values["hosts"] and not values["cidrs"]:
        ruled = True
    refused = ruled and (port in values["ports"] if values["ports"] else any(values.values()))
    if is_never(address):
        return
    assert decide(policy, address, port, listed=listed, own=own_all).allowed == (not refused)


def test_names_are_matched_as_wholes() -> None:
    policy = EgressPolicy.allow(hosts=["example.org", "*.example.net"])
    assert lists_name(policy, "example.org")
    assert lists_name(policy, "a.example.net")
    assert lists_name(policy, "a.b.example.net")
    for other in ("www.example.org", "badexample.org", "example.net", "badexample.net", "org"):
        assert not lists_name(policy, other)
        assert not decide_name(policy, other).allowed


def test_a_wildcard_does_not_name_the_host() -> None:
    policy = EgressPolicy.allow(hosts=["*.supermachine.internal", "*.internal"])
    assert not decide_name(policy, HOST).allowed
    assert not decide(policy, a.HOST4, 80, listed=True, own=own_none).allowed


def test_denied_names_are_refused_or_with_ports_their_addresses_are() -> None:
    by_name = EgressPolicy.deny(hosts=["bad.example"])
    assert not decide_name(by_name, "bad.example").allowed
    assert decide_name(by_name, "good.example").allowed
    by_port = EgressPolicy.deny(hosts=["bad.example"], ports=[25])
    assert decide_name(by_port, "bad.example").allowed
    public = ip_address("93.184.216.34")
    assert not decide(by_port, public, 25, listed=True, own=own_none).allowed
    assert decide(by_port, public, 25, listed=False, own=own_none).allowed
    assert decide(by_port, public, 80, listed=True, own=own_none).allowed


def test_networks_alone_allow_no_names_and_ports_alone_allow_all() -> None:
    assert not decide_name(EgressPolicy.allow(cidrs=["0.0.0.0/0"]), "example.org").allowed
    assert decide_name(EgressPolicy.allow(ports=[443]), "example.org").allowed


# --- names that were told ---

told_address = st.integers(0, 7).map(lambda n: IPv4Address(0x08080800 + n))
steps = st.lists(
    st.tuples(
        st.sampled_from(["tell", "use", "wait"]),
        told_address,
        st.booleans(),
        st.floats(0, 100),
    ),
    max_size=40,
)


@given(steps)
def test_addresses_stay_their_names_for_their_ttl_and_a_minute_after_use(
    steps: list[tuple[str, IPv4Address, bool, float]],
) -> None:
    names = ToldNames()
    now = 0.0
    model: dict[IPv4Address, tuple[bool, float, float]] = {}
    for step, address, listed, amount in steps:
        if step == "wait":
            now += amount
        elif step == "tell":
            old = model.get(address, (False, 0.0, 0.0))
            kept = old[0] and old[2] > now
            names.tell(address, "n", listed=listed, ttl=amount, now=now)
            model[address] = (listed or kept, amount + GRACE, now + amount + GRACE)
        elif address in model and model[address][2] > now:
            names.use(address, now)
            flag, lifetime, _ = model[address]
            model[address] = (flag, lifetime, now + lifetime)
        else:
            names.use(address, now)
        for each, (flag, _, expires) in model.items():
            assert names.listed(each, now) == (flag and expires > now)
            assert names.name(each, now) == ("n" if expires > now else None)


def test_the_table_of_names_is_bounded_and_loses_what_was_longest_unused() -> None:
    names = ToldNames(limit=2)
    first, second, third = (IPv4Address(n) for n in (1, 2, 3))
    names.tell(first, "a", listed=True, ttl=30, now=0)
    names.tell(second, "b", listed=True, ttl=30, now=0)
    names.use(first, 1)
    names.tell(third, "c", listed=True, ttl=30, now=2)
    assert len(names) == 2
    assert names.name(first, 3) == "a"
    assert names.name(second, 3) is None


# --- limits ---


@given(st.integers(1, 10**9), st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 10))))
def test_no_more_leaves_a_bucket_than_its_burst_and_its_rate(
    rate: int, takes: list[tuple[int, float]]
) -> None:
    bucket = TokenBucket(rate)
    now, taken = 1000.0, 0
    for amount, pause in takes:
        now += pause + bucket.take(amount, now)
        taken += amount
        assert taken <= bucket.burst + rate * (now - 1000.0) * (1 + 1e-6) + 1


def test_a_bucket_gives_nothing_to_those_who_do_not_wait_while_there_is_a_debt() -> None:
    bucket = TokenBucket(1000)
    assert bucket.try_take(bucket.burst + 500, 0)
    assert not bucket.try_take(1, 0.4)
    assert bucket.try_take(1, 0.6)


# --- events ---


def event(n: int) -> EgressEvent:
    return EgressEvent(
        allowed=True, protocol="tcp", address="8.8.8.8", port=n, host=None, reason="any"
    )


@given(st.integers(1, 5), st.lists(st.integers(0, 9), max_size=20))
def test_a_reader_gets_or_misses_every_event(size: int, batches: list[int]) -> None:
    feed = EventFeed()
    reader = feed.subscribe(size)
    published = accounted = 0
    last = -1
    for batch in batches:
        for _ in range(batch):
            feed.publish(event(published))
            published += 1
        while True:
            try:
                got = reader.receive_nowait()
            except trio.WouldBlock:
                break
            accounted += 1 + got.missed
            assert got.port > last
            last = got.port
        assert accounted == published
    reader.close()
    feed.close()


async def test_a_readers_end_is_that_of_the_feed_and_a_reader_may_leave_before() -> None:
    feed = EventFeed()
    left = feed.subscribe(1)
    async with feed.subscribe(8) as stays:
        feed.publish(event(1))
        left.close()
        feed.publish(event(2))
        feed.publish(event(3))
        feed.close()
        assert [e.port async for e in stays] == [1, 2, 3]
    async with feed.subscribe(1) as late:
        assert [e async for e in late] == []
    with pytest.raises(ConfigError):
        feed.subscribe(0)


def test_events_are_values() -> None:
    assert attrs.evolve(event(1), missed=2) != event(1)
    assert {event(1), event(1)} == {event(1)}
