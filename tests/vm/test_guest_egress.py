"""What programs of a guest see of the outside, and what the agent asks the host for."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from trio_supermachine import Image, Vm

from ..support.outside import (
    ABSENT,
    BABBLER,
    BROKEN,
    ECHO,
    GREETER,
    HOLDER,
    LONG,
    MUCH,
    REFUSED,
    RUDE,
    TCP,
    UDP,
    Opened,
    address_of,
    guest,
    run,
)

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.small_kernel]

#: Connections that the guest has ended, and the host has not noticed yet.
ENDING = 32

OWN4, OWN6 = "192.0.0.2", "fd73:6d00::2"

#: Addresses as programs name them, and their own that they see then.
PLACES = [
    ("93.184.216.34", OWN4),
    ("192.0.0.3", OWN4),
    ("10.1.2.3", OWN4),
    ("2001:db8::5", OWN6),
    ("fd73:6d00::3", OWN6),
    ("::ffff:93.184.216.34", f"::ffff:{OWN4}"),
]


async def test_a_connection_arrives_where_it_was_meant_to_go(baked: Image) -> None:
    async with guest(baked) as (vm, outside):
        for command in ("tcp", "nonblocking"):
            for address, own in PLACES:
                words = ["said"] if command == "tcp" else []
                said = "said" if command == "tcp" else "later"
                lines = await run(vm, command, address, str(ECHO), *words)
                before = [] if command == "tcp" else ["error 0"]
                assert lines == [*before, f"peer {address} {ECHO}", f"own {own} 0", said]
                assert outside.opened.pop() == Opened(TCP, address_of(address), ECHO)
        assert not outside.opened


async def test_sockets_of_mptcp_are_led_out_like_those_of_tcp(baked: Image) -> None:
    async with guest(baked) as (vm, outside):
        for address, own in PLACES:
            lines = await run(vm, "mptcp", address, str(ECHO), "said")
            if lines == ["socket: Protocol not supported"]:
                pytest.skip("the guest's kernel has no MPTCP")
            assert lines == [f"peer {address} {ECHO}", f"own {own} 0", "said"]
            assert outside.opened.pop() == Opened(TCP, address_of(address), ECHO)


async def test_datagrams_arrive_and_are_answered_from_where_they_went(baked: Image) -> None:
    async with guest(baked) as (vm, outside):
        for family in "46":
            mine = [place for place in PLACES if (":" in place[0]) == (family == "6")]
            addresses = [address for address, _ in mine]
            asked = [Opened(UDP, address_of(address), ECHO) for address in addresses]
            answers = {place: [f"from {place} {ECHO}", "same"] for place in addresses}
            lines = await run(vm, "udp", family, *addresses, addresses[0])
            assert lines == [line for p in [*addresses, addresses[0]] for line in answers[p]]
            assert outside.opened == asked  # the first address's flow served it twice
            outside.opened.clear()
            assert await run(vm, "connected", family, *addresses) == [
                line
                for address, own in mine
                for line in [
                    f"peer {address} {ECHO}", f"own {own} 0", *answers[address], *answers[address],
                ]
            ]  # fmt: skip
            outside.opened.clear()


async def test_each_side_may_end_first_and_loses_nothing(baked: Image) -> None:
    async with guest(baked) as (vm, outside):
        lines = await run(vm, "tcp", "1.2.3.4", str(GREETER), "a late word")
        assert lines[2:] == ["hello"]
        while not outside.heard:
            await trio.testing.wait_all_tasks_blocked()
        assert outside.heard == [b"a late word"]
        done = await vm.run_process(
            ["/outside", "tcp", "1.2.3.4", str(LONG), ""], capture_stdout=True
        )
        assert done.stdout.split(b"\n", 2)[2] == MUCH


async def test_a_refusal_is_a_reset(baked: Image) -> None:
    async with guest(baked) as (vm, outside):
        for port in (REFUSED, ABSENT, BABBLER, RUDE):
            for address in ("1.2.3.4", "2001:db8::1"):
                (line,) = await run(vm, "refused", address, str(port))
                call, error = line.split(": ")
                assert call in ("connect", "send", "read")  # it may be that fast
                assert error == "Connection reset by peer"
        assert len(outside.opened) == 8


async def test_what_is_the_machines_own_stays_inside(baked: Image) -> None:
    async with guest(baked) as (vm, outside):
        for address in ("127.0.0.1", "127.3.2.1", OWN4, "::1", OWN6, f"::ffff:{OWN4}"):
            lines = await run(vm, "inside", address)
            assert len(lines) == 4
            assert {line.split(maxsplit=1)[1] for line in lines} <= {f"{address} 0", "127.0.0.1 0"}
        assert not outside.opened


async def test_nothing_but_what_was_led_there_gets_anything_from_the_agents_port(
    baked: Image,
) -> None:
    async with guest(baked) as (vm, outside):
        lines = await run(vm, "garbage")
        assert len(lines) == 7
        assert all(line.endswith(" reset") for line in lines), lines
        assert not outside.opened
        assert (await run(vm, "tcp", "1.2.3.4", str(ECHO), "fine"))[2:] == ["fine"]


async def test_programs_that_use_a_resolver_ask_the_host(baked: Image) -> None:
    async with guest(baked) as (vm, outside):
        assert await vm.read_file("/etc/resolv.conf") == b"nameserver 192.0.0.1\n"
        # Nobody answers but by an echo, which is no answer: what matters is who was asked.
        done = await vm.run_process(
            ["nslookup", "example.com"], check=False, capture_stdout=True, capture_stderr=True
        )
        assert b"192.0.0.1" in done.stdout
        assert Opened(UDP, address_of("192.0.0.1"), 53) in outside.opened


async def test_numeric_addresses_of_both_families_are_usable_by_what_this_machine_has(
    baked: Image,
) -> None:
    async with guest(baked) as (vm, _):
        for address in ("93.184.216.34", "2001:db8::5"):
            assert await run(vm, "resolve", address) == [f"found {address} 80"]


async def test_another_network_namespace_is_not_connected(baked: Image) -> None:
    async with guest(baked) as (vm, outside):
        script = "unshare -n sh -c 'ip link set lo up; /outside refused 1.2.3.4 7'"
        done = await vm.run_process(["sh", "-c", script], capture_stdout=True, check=False)
        assert done.stdout == b"connect: Network unreachable\n"
        assert not outside.opened


async def test_a_copy_loses_its_connections_and_makes_new_ones(
    baked: Image, tmp_path: Path
) -> None:
    async with guest(baked) as (vm, outside):
        # What outlives its exec: the copy does not have that.
        script = f"/outside hold 1.2.3.4 {HOLDER} </dev/null >/said 2>&1 &"
        await vm.run_process(["setsid", "sh", "-c", script])
        while b"open" not in await read_file(vm, "/said"):
            pass
        await run(vm, "udp", "4", "5.6.7.8")
        copy = await vm.snapshot(tmp_path / "snapshot")
        assert (await run(vm, "tcp", "1.2.3.4", str(ECHO), "here"))[2:] == ["here"]
        assert await read_file(vm, "/said") == b"open\n"
        assert outside.live == 2  # one of them a flow of datagrams
    async with guest(copy) as (vm, outside):
        while b"read" not in (said := await read_file(vm, "/said")):
            pass
        assert said == b"open\nread: Connection reset by peer\n"
        for address, own in PLACES:
            lines = await run(vm, "tcp", address, str(ECHO), "copy")
            assert lines == [f"peer {address} {ECHO}", f"own {own} 0", "copy"]
        assert (await run(vm, "udp", "4", "5.6.7.8"))[1:] == ["same"]
        assert len(outside.opened) == len(PLACES) + 1


async def read_file(vm: Vm, path: str) -> bytes:
    try:
        return await vm.read_file(path)
    except FileNotFoundError:
        return b""


async def test_more_connections_than_there_may_be_wait_for_their_turn(baked: Image) -> None:
    async with guest(baked) as (vm, outside):
        assert await run(vm, "many", "1500", "1.2.3.4", str(ECHO)) == ["wrong 0"]
        assert outside.most <= 1024 + ENDING
        assert len(outside.opened) == 1500


async def test_flows_of_datagrams_make_room_for_each_other(baked: Image) -> None:
    async with guest(baked) as (vm, outside):
        assert await run(vm, "ports", "600", "1.2.3.4") == ["right 600"]
        assert outside.most <= 256 + ENDING
        assert await run(vm, "ports", "1", "2001:db8::1") == ["right 1"]


async def test_datagrams_are_whole_or_lost(baked: Image) -> None:
    async with guest(baked) as (vm, _):
        for address, size in (("1.2.3.4", 0), ("1.2.3.4", 100), ("2001:db8::1", 65507)):
            assert await run(vm, "burst", address, "300", str(size)) == ["some"]
        for port in (BROKEN, REFUSED, ABSENT, BABBLER):
            script = f"echo x | timeout 1 nc -u -w 1 1.2.3.4 {port}"
            await vm.run_process(["sh", "-c", script], check=False)
        assert (await run(vm, "udp", "4", "1.2.3.4"))[1:] == ["same"]


@pytest.mark.parametrize("words", ["ipv6.disable=1", "ipv6.disable_ipv6=1"])
async def test_without_ipv6_there_is_a_line_on_the_console_and_ipv4(
    busybox: Image, words: str
) -> None:
    async with guest(busybox, words) as (vm, outside):
        assert b"supermachine: no IPv6 to the outside" in vm.console.tail(100_000)
        assert (await run(vm, "tcp", "1.2.3.4", str(ECHO), "word"))[2:] == ["word"]
        assert (await run(vm, "udp", "4", "1.2.3.4"))[1:] == ["same"]
        (line,) = await run(vm, "refused", "2001:db8::1", str(ECHO))
        assert line.startswith(("socket: ", "connect: "))
        if "disable_ipv6" in words:  # there are sockets of IPv6, for IPv4
            lines = await run(vm, "tcp", "::ffff:1.2.3.4", str(ECHO), "word")
            assert lines == [f"peer ::ffff:1.2.3.4 {ECHO}", f"own ::ffff:{OWN4} 0", "word"]
        assert {opened.address for opened in outside.opened} == {address_of("1.2.3.4")}
