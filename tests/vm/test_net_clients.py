"""Clients that nobody here wrote, in guests, reach what the policy allows, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from trio_supermachine import EgressPolicy, Image, VmConfig
from trio_supermachine.net.addresses import HOST_NAME

from ..support.debian_image import run
from ..support.network_hosts import (
    HOST4,
    PAGE,
    PUBLIC,
    PYTHON,
    call,
    directory,
    fetch,
    loopback,
    names,
    own_address,
    shell,
    website,
)
from ..support.network_images import clients, network_layout

__all__ = ["clients", "directory", "fetch", "names", "network_layout"]  # fixtures

pytestmark = [pytest.mark.vm, pytest.mark.long]


async def test_curl_urllib_and_a_static_program_fetch_a_page_from_the_hosts_loopback(
    clients: Image, fetch: bytes, directory: Path
) -> None:
    async with website(directory) as port, clients.start(VmConfig(egress=loopback(port))) as vm:
        url = f"http://{HOST_NAME}:{port}/page"
        await vm.write_file("/bin/fetch", fetch, mode=0o755)
        assert await call(vm, "curl", "-sSf", url) == PAGE
        assert await call(vm, "python3", "-c", PYTHON, url) == PAGE
        assert await call(vm, "fetch", HOST_NAME, str(port), "/page") == PAGE
        assert await call(vm, "busybox", "wget", "-qO-", url) == PAGE


async def test_curl_urllib_and_a_static_program_fetch_a_page_from_an_allowed_network(
    clients: Image, fetch: bytes, directory: Path, names: dict[str, Sequence[str]]
) -> None:
    address = own_address()
    names["shop.example"] = [address]
    config = VmConfig(egress=EgressPolicy.allow(hosts=["shop.example"], cidrs=[address]))
    async with website(directory, address) as port, clients.start(config) as vm:
        await vm.write_file("/bin/fetch", fetch, mode=0o755)
        for host in (address, "shop.example"):
            url = f"http://{host}:{port}/page"
            assert await call(vm, "curl", "-sSf", url) == PAGE
            assert await call(vm, "python3", "-c", PYTHON, url) == PAGE
        assert await call(vm, "fetch", "shop.example", str(port), "/page") == PAGE


async def test_git_clones_over_http(clients: Image, directory: Path) -> None:
    work = directory / "work"
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    await run(["git", "init", "-q", "-b", "main", str(work)])
    (work / "file").write_bytes(PAGE)
    await run(["git", "-C", str(work), "add", "file"])
    await run(["git", "-C", str(work), *identity, "commit", "-qm", "One"])
    bare = directory / "project.git"
    await run(["git", "clone", "-q", "--bare", str(work), str(bare)])
    await run(["git", "-C", str(bare), "update-server-info"])
    head = (await run(["git", "-C", str(bare), "rev-parse", "main"])).stdout
    async with website(directory) as port, clients.start(VmConfig(egress=loopback(port))) as vm:
        url = f"http://{HOST_NAME}:{port}/project.git"
        await call(vm, "git", "clone", "-q", url, "/tmp/project")
        assert await call(vm, "git", "-C", "/tmp/project", "rev-parse", "HEAD") == head
        assert await vm.read_file("/tmp/project/file") == PAGE


async def test_a_policy_for_one_port_tells_what_it_allowed_and_what_it_refused(
    clients: Image, directory: Path
) -> None:
    async with (
        website(directory) as port,
        website(directory) as other,
        clients.start(VmConfig(egress=loopback(port))) as vm,
    ):
        events = vm.egress_events()
        curl = ["curl", "-4sS"]
        await call(vm, *curl, "-o", "/dev/null", f"http://{HOST_NAME}:{port}/page")
        await call(vm, *curl, f"http://{HOST_NAME}:{other}/page", code=None)
        await call(vm, *curl, "http://198.51.100.1/", code=None)
        told = [events.receive_nowait() for _ in range(events.statistics().current_buffer_used)]
    connections = [(e.allowed, e.protocol, str(e.address), e.port) for e in told if e.port != 53]
    assert connections == [
        (True, "tcp", HOST4, port),
        (False, "tcp", HOST4, other),
        (False, "tcp", "198.51.100.1", 80),
    ]
    assert all(e.reason for e in told)
    questions = [e for e in told if e.protocol == "dns"]
    assert questions
    assert all(e.allowed and e.host == HOST_NAME for e in questions)


# --- names ---


async def test_names_resolve_over_udp_and_over_tcp(
    clients: Image, fetch: bytes, names: dict[str, Sequence[str]]
) -> None:
    names["small.example"] = PUBLIC[:2]
    names["large.example"] = PUBLIC
    names["both.example"] = [PUBLIC[0], "2620:fe::9"]
    policy = EgressPolicy.allow(hosts=["*.example"])
    async with clients.start(VmConfig(egress=policy)) as vm:
        await vm.write_file("/bin/fetch", fetch, mode=0o755)
        dig = "dig +short +tries=1 +time=20"
        for transport in ("+notcp", "+tcp"):
            answer = await shell(vm, f"{dig} {transport} small.example A")
            assert sorted(answer.split()) == PUBLIC[:2]
        assert await shell(vm, f"{dig} both.example AAAA") == "2620:fe::9\n"
        # An answer that no datagram holds is truncated, and asked for again.
        assert len((await shell(vm, f"{dig} large.example A")).split()) == len(PUBLIC)
        assert "flags: qr tc" in await shell(vm, "dig +ignore +notcp large.example A")
        by, *found = (await call(vm, "fetch", "small.example")).decode().split()
        assert (by, sorted(found)) == ("udp", PUBLIC[:2])
        by, *found = (await call(vm, "fetch", "large.example")).decode().split()
        assert (by, len(found)) == ("tcp", len(PUBLIC))
        # glibc with AI_ADDRCONFIG, and busybox
        told = await shell(vm, "getent ahosts both.example")
        assert PUBLIC[0] in told
        assert "2620:fe::9" in told
        assert PUBLIC[1] in await shell(vm, "busybox nslookup small.example")
        assert "NXDOMAIN" in await shell(vm, "dig +tries=1 +time=20 none.example A")
        assert "REFUSED" in await shell(vm, "dig +tries=1 +time=20 other.test A")


# --- copies ---


async def test_a_restored_copy_has_its_own_policy(
    clients: Image, directory: Path, tmp_path: Path
) -> None:
    async with website(directory) as port:
        get = ["curl", "-sSf", "-o", "/dev/null", f"http://{HOST_NAME}:{port}/page"]
        async with clients.start(VmConfig(egress=loopback(port))) as vm:
            await call(vm, *get)
            image = await vm.snapshot(tmp_path / "allowed")
        for policy in (None, EgressPolicy.deny_all(), loopback(port % 65535 + 1)):
            async with image.start(VmConfig(egress=policy, require_restore=True)) as vm:
                # The name's address is known from before, and of no use.
                await call(vm, *get, code=None)
                await call(vm, "curl", "-sSf", f"http://{HOST4}:{port}/page", code=None)
                refused = await vm.snapshot(tmp_path / "refused") if policy is None else None
            if refused is not None:
                async with refused.start(VmConfig(egress=loopback(port))) as vm:
                    await call(vm, *get)
