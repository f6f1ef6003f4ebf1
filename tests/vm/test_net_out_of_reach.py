"""What is not for guests stays out of their reach, whatever they try."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from trio_supermachine import EgressPolicy, Image, VmConfig
from trio_supermachine.net.addresses import HOST_NAME

from ..support.guests import PATIENCE
from ..support.network_hosts import (
    HOST4,
    HOST6,
    LOOPBACK,
    PAGE,
    PYTHON,
    call,
    directory,
    fetch,
    flood,
    loopback,
    names,
    shell,
    website,
)
from ..support.network_images import clients, network_layout

__all__ = ["clients", "directory", "fetch", "flood", "names", "network_layout"]  # fixtures

pytestmark = pytest.mark.vm

DGRAM = socket.SOCK_DGRAM
_file = Path("/proc/net/if_inet6")
#: The kernel's list of the host's IPv6 addresses.
IF_INET6 = _file.read_text().splitlines() if _file.exists() else []

# --- what is refused ---


@asynccontextmanager
async def reachable() -> AsyncIterator[tuple[int, list[Any]]]:
    """A port on all addresses of the host, and who has connected, or sent a datagram, there."""
    accepted: list[Any] = []

    async def accept(stream: trio.SocketStream) -> None:
        accepted.append(stream.socket.getpeername())
        await stream.aclose()

    async def receive(sock: trio.socket.SocketType) -> None:
        while True:
            accepted.append((await sock.recvfrom(100))[1])

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, accept, 0)
        port = listeners[0].socket.getsockname()[1]
        with trio.socket.socket(socket.AF_INET6 if IF_INET6 else socket.AF_INET, DGRAM) as sock:
            await sock.bind(("::" if IF_INET6 else "0.0.0.0", port))
            nursery.start_soon(receive, sock)
            yield port, accepted
            nursery.cancel_scope.cancel()


def all_addresses() -> list[str]:
    """The host's own addresses, and how a guest may call its loopback."""
    found = ["127.0.0.1", "::1", "0.0.0.0", "::", HOST4, HOST6, "::ffff:127.0.0.1"]
    for line in Path("/proc/net/fib_trie").read_text().split("Local:")[1].split("|--")[1:]:
        address, _, rest = line.partition("\n")
        if "host LOCAL" in rest:
            found += [address.strip(), f"::ffff:{address.strip()}"]
    for line in IF_INET6:
        found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line.split()[0])))
    return list(dict.fromkeys(found))


TRY = """
import socket, sys
port = int(sys.argv[1])
for address in sys.argv[2:]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(0)
        try:
            s.sendto(b"x", (address, port))
        except OSError:
            pass
    with socket.socket(family) as s:
        s.settimeout(60)
        try:
            s.connect((address, port))
            s.sendall(b"x")
            got = s.recv(1)
        except TimeoutError:
            print(address, "hangs")
        except OSError:
            pass
        else:
            print(address, "answers", got)
"""


@pytest.mark.parametrize("allow", [EgressPolicy.deny_private, EgressPolicy.deny_all])
async def test_by_default_no_address_of_the_host_is_in_reach(clients: Image, allow: Any) -> None:
    config = VmConfig() if allow == EgressPolicy.deny_private else VmConfig(egress=allow())
    async with reachable() as (port, accepted), clients.start(config) as vm:
        told = await call(vm, "python3", "-c", TRY, str(port), *all_addresses())
        assert told == b""
        assert accepted == []


async def test_a_policy_that_allows_all_leaves_the_hosts_loopback_out(clients: Image) -> None:
    config = VmConfig(egress=EgressPolicy.allow_all())
    async with reachable() as (port, accepted), clients.start(config) as vm:
        loopback = [a for a in all_addresses() if "127." in a or a in ("::1", "::", "0.0.0.0")]
        told = await call(vm, "python3", "-c", TRY, str(port), HOST4, HOST6, *loopback)
        assert told == b""
        assert accepted == []


async def test_clients_are_told_of_a_refusal_at_once(clients: Image, fetch: bytes) -> None:
    async with clients.start(VmConfig(egress=EgressPolicy.deny_all())) as vm:
        await vm.write_file("/bin/fetch", fetch, mode=0o755)
        for url in ("http://192.0.2.1/", f"http://{HOST_NAME}/", "http://[2620:fe::9]/"):
            await call(vm, "curl", "-sS", url, code=None)
            await call(vm, "python3", "-c", PYTHON, url, code=None)
        await call(vm, "git", "clone", "-q", "http://192.0.2.1/x.git", "/tmp/x", code=128)
        await call(vm, "fetch", "example.org", "80", "/", code=4)


# --- names ---

EVIL = [LOOPBACK, "::1", "0.0.0.0", "169.254.169.254", HOST4, HOST6, "::ffff:127.0.0.1"]


@pytest.mark.parametrize(
    "policy",
    [
        EgressPolicy.allow_all(),
        EgressPolicy.deny_private(),
        EgressPolicy.allow(hosts=["*.evil.example"]),
    ],
    ids=str,
)
async def test_no_name_leads_to_the_host_or_to_metadata(
    clients: Image, names: dict[str, Sequence[str]], policy: EgressPolicy
) -> None:
    async with reachable() as (port, accepted), clients.start(VmConfig(egress=policy)) as vm:
        for number, address in enumerate(EVIL):
            name = f"{number}.evil.example"
            names[name] = [address]
            assert await shell(vm, f"dig +short {name} A {name} AAAA") == ""
            await call(vm, "curl", "-sS", f"http://{name}:{port}/", code=None)
        assert accepted == []


# --- guests that mean harm ---


def memory() -> int:
    """What this process has allocated and uses, in MiB: not files, and no guest's memory either."""
    kib = 0
    of_file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, value, *_ = line.split()
        if "-" in name:
            of_file = line.split()[4] != "0"  # the inode
        elif name == "Rss:" and not of_file:
            kib += int(value)
    return kib >> 10


@asynccontextmanager
async def silent_server() -> AsyncIterator[int]:
    """A TCP port of the host's loopback that accepts, and never reads."""
    streams: list[trio.SocketStream] = []

    async def accept(stream: trio.SocketStream) -> None:
        streams.append(stream)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, accept, 0, host=LOOPBACK))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "attack",
    [
        ["connect", "20000", HOST4, "{port}"],
        ["connect", "2000", HOST4, "1"],
        ["datagrams", "20000", HOST4],
        ["garbage", "2000", "61030"],
    ],
    ids=lambda attack: "-".join(attack[:2]),
)
async def test_a_flood_of_one_guest_costs_the_host_little_and_disturbs_no_other(
    clients: Image, flood: bytes, directory: Path, attack: list[str]
) -> None:
    async with silent_server() as silent, website(directory) as port:
        policy = loopback(silent, port)
        get = ["curl", "-sSf", "--max-time", "60", f"http://{HOST_NAME}:{port}/page"]
        async with (
            clients.start(VmConfig(egress=policy)) as hostile,
            clients.start(VmConfig(egress=policy)) as other,
        ):
            await hostile.write_file("/bin/flood", flood, mode=0o755)
            await shell(hostile, "echo 1 >/proc/sys/net/ipv4/tcp_fin_timeout")
            assert await call(other, *get) == PAGE
            before = memory()
            command = ["flood", *(word.format(port=silent) for word in attack)]
            async with hostile.exec(command) as child:
                done = 0
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def watch() -> None:
                        nonlocal done
                        line = b""
                        while not line.endswith(b"\n"):
                            chunk = await child.stdout.receive_some()
                            assert chunk, hostile.console.tail()
                            line += chunk
                        done = int(line.split()[0])

                    while done == 0:
                        assert await call(other, *get) == PAGE
                        assert memory() - before < 64
                assert done == int(attack[1])
                assert await call(other, *get) == PAGE
                assert await call(hostile, "echo", "alive") == b"alive\n"
                child.kill()
            assert memory() - before < 64
            # There is room again when the guest's kernel has forgotten the sockets of the flood: it
            # asks after those whose other end has said that it sends no more.
            again = ["--retry", "60", "--retry-delay", "1", "--retry-all-errors"]
            assert await call(hostile, *get, *again) == PAGE


async def test_a_routing_header_in_a_payload_is_payload(clients: Image) -> None:
    """It would be one where the host's own programs connect to a guest, and is none here."""
    payload = b"SMUX-PORT-V1\0\0\0\0" + (22).to_bytes(4, "big") + b"the rest"
    got = trio.Event()
    received = bytearray()

    async def accept(stream: trio.SocketStream) -> None:
        async for chunk in stream:
            received.extend(chunk)
        got.set()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, accept, 0, host=LOOPBACK))
        port = listeners[0].socket.getsockname()[1]
        async with clients.start(VmConfig(egress=loopback(port))) as vm:
            await vm.write_file("/tmp/payload", payload)
            script = f"cat /tmp/payload >/dev/tcp/{HOST4}/{port}"
            await call(vm, "bash", "-c", script)
            with trio.fail_after(PATIENCE):
                await got.wait()
        assert received == payload
        nursery.cancel_scope.cancel()
