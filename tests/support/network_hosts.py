"""The outside of guests with clients: websites, names, and programs for the guests."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from trio_supermachine import EgressPolicy, Vm
from trio_supermachine.net.addresses import HOST_NAME

from . import GUEST_PROGRAMS
from .guests import PATIENCE, read_past

PAGE = random.Random(2).randbytes(3 << 20)
LOOPBACK = "127.0.0.1"
#: The host's loopback, as guests call it.
HOST4, HOST6 = "192.0.0.3", "fd73:6d00::3"
#: Public addresses, to be told; nothing connects to them.
PUBLIC = [f"9.9.0.{n}" for n in range(200)]

#: Fetches the page at a URL, by urllib.
PYTHON = "import sys, urllib.request as u; sys.stdout.buffer.write(u.urlopen(sys.argv[1]).read())"


@pytest.fixture(scope="session")
def fetch(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A static program with a resolver of its own: ``guest_programs/fetch.c``."""
    return compiled("fetch", tmp_path_factory.mktemp("fetch"))


@pytest.fixture(scope="session")
def flood(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """``guest_programs/flood.c``."""
    return compiled("flood", tmp_path_factory.mktemp("flood"))


def compiled(name: str, place: Path) -> bytes:
    command = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl", "-static"]
    command += ["-O2", "-s", "-o", str(place / name), str(GUEST_PROGRAMS / f"{name}.c")]
    subprocess.run(command, check=True)
    return (place / name).read_bytes()


def own_address() -> str:
    """An address of the host that is not loopback. Nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((PUBLIC[0], 9))
        except OSError:
            pytest.skip("the host has no address but its loopback")
        return str(sock.getsockname()[0])


@asynccontextmanager
async def website(directory: Path, address: str = LOOPBACK) -> AsyncIterator[int]:
    """Python's own web server; its port."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", address]
    async with trio.open_nursery() as nursery:
        start = partial(
            trio.run_process,
            [*command, "--directory", str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        server: trio.Process = await nursery.start(start)
        assert server.stdout is not None
        async with server.stdout:
            found = re.search(rb" port (\d+) ", await read_past(server.stdout, b"\n"))
            assert found
            yield int(found[1])
            server.kill()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What the website has."""
    made = tmp_path / "website"
    made.mkdir()
    (made / "page").write_bytes(PAGE)
    return made


def loopback(*ports: int) -> EgressPolicy:
    return EgressPolicy.allow(hosts=[HOST_NAME], ports=ports)


async def call(vm: Vm, *command: str | bytes, code: int | None = 0) -> bytes:
    """The output of a program in the guest, which ends by itself; ``None`` is any code but 0."""
    with trio.fail_after(PATIENCE * 2):
        done = await vm.run_process(
            list(command), capture_stdout=True, capture_stderr=True, check=False
        )
    told = done.stdout + done.stderr
    assert done.returncode == code if code is not None else done.returncode != 0, told
    return done.stdout


async def shell(vm: Vm, script: str) -> str:
    return (await call(vm, "bash", "-c", script)).decode()


class Resolver(trio.abc.HostnameResolver):
    """What the host's resolver says."""

    def __init__(self, names: dict[str, Sequence[str]]) -> None:
        self.names = names

    async def getaddrinfo(
        self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> Any:
        await trio.lowlevel.checkpoint()
        name = host.decode() if isinstance(host, bytes) else host
        families = {
            socket.AF_INET6 if ":" in a else socket.AF_INET for a in self.names.get(name, ())
        }
        found = [
            (kind, type or socket.SOCK_STREAM, proto, "", (a, port or 0) + (0, 0) * (":" in a))
            for kind in families
            for a in self.names[name]
            if (":" in a) == (kind == socket.AF_INET6) and family in (0, kind)
        ]
        if not found:
            raise socket.gaierror(socket.EAI_NODATA if families else socket.EAI_NONAME, name)
        return found

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "not asked")


@pytest.fixture
async def names() -> dict[str, Sequence[str]]:
    """The names that the host can resolve, and their addresses, for a test to fill."""
    names: dict[str, Sequence[str]] = {}
    trio.socket.set_custom_hostname_resolver(Resolver(names))
    await trio.lowlevel.checkpoint()
    return names
