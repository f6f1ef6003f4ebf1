"""The outside as a guest's agent knows it: a host that speaks the wire, and its answers by port.

It stands in the place of the host's server, to see what the agent says, and to answer as that
server would not. The programs in the guest are those of ``guest_programs/outside.c``.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from ipaddress import IPv6Address

import attrs
import trio

from trio_supermachine import Image, Vm, VmConfig
from trio_supermachine.vm.launch import launch
from trio_supermachine.vm.plan import plan_start
from trio_supermachine.vm.running import RunningVm
from trio_supermachine.vsock.stream import VsockStream

from . import GUEST_PROGRAMS
from .guests import PATIENCE

ERROR, OK, DATA, OPEN = 4, 5, 10, 48
TCP, UDP = 6, 17

ECHO = 7  # says what it hears, and ends when the guest does
GREETER = 13  # says something and ends; the guest may go on
HOLDER = 14  # says one byte, and nothing more
REFUSED = 111
ABSENT = 112  # closes without an answer
RUDE = 113  # resets once it has heard something
LONG = 114  # says much and closes at once
BABBLER = 115  # answers by something that is no answer
SILENT = 116  # UDP: hears, and says nothing
BROKEN = 117  # UDP: answers by frames that are none

MUCH = b"much of it " * 300_000

_HEADER = struct.Struct("<IBBH")
_PROGRAM = GUEST_PROGRAMS / "outside.c"


def address_of(text: str) -> IPv6Address:
    """An address as the wire has it."""
    return IPv6Address(text if ":" in text else f"::ffff:{text}")


@attrs.frozen
class Opened:
    """What an OPEN frame asked for."""

    protocol: int
    address: IPv6Address
    port: int


@attrs.define
class Outside:
    """Serves one guest: what that has asked for, and how many of its connections are open."""

    opened: list[Opened] = attrs.field(factory=list)
    heard: list[bytes] = attrs.field(factory=list)
    live: int = 0
    most: int = 0

    async def serve(self, stream: VsockStream) -> None:
        self.live += 1
        self.most = max(self.most, self.live)
        try:
            with suppress(trio.BrokenResourceError):
                await self._serve(stream)
        finally:
            self.live -= 1
            await trio.aclose_forcefully(stream)

    async def _serve(self, stream: VsockStream) -> None:
        header = _HEADER.unpack(await _receive_exactly(stream, _HEADER.size))
        assert header == (24, OPEN, 0, 0)
        protocol, port, address = struct.unpack("<II16s", await _receive_exactly(stream, 24))
        self.opened.append(Opened(protocol, IPv6Address(address), port))
        if port == REFUSED:
            payload = struct.pack("<iI7sQ", 111, 7, b"refused", 0)
            await stream.send_all(_HEADER.pack(len(payload), ERROR, 0, 0) + payload)
        elif port == BABBLER:
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        elif port != ABSENT:
            await stream.send_all(_HEADER.pack(8, OK, 0, 0) + bytes(8))
            await (self._talk(stream, port) if protocol == TCP else self._datagrams(stream, port))
        await stream.aclose()

    async def _talk(self, stream: VsockStream, port: int) -> None:
        if port == GREETER:
            await stream.send_all(b"hello")
            await stream.send_eof()
            self.heard.append(b"".join([chunk async for chunk in stream]))
        elif port == HOLDER:
            await stream.send_all(b"!")
            async for _ in stream:
                pass
        elif port == RUDE:
            await stream.receive_some()
            stream.abort()
        elif port == LONG:
            await stream.send_all(MUCH)
            await stream.send_eof()
        else:
            async for chunk in stream:
                await stream.send_all(chunk)
            await stream.send_eof()

    async def _datagrams(self, stream: VsockStream, port: int) -> None:
        if port == BROKEN:
            await stream.send_all(_HEADER.pack(65508, DATA, 0, 0) + bytes(65508))
        while True:
            header = await _receive_exactly(stream, _HEADER.size)
            size, kind, sub, zero = _HEADER.unpack(header)
            assert (kind, sub, zero) == (DATA, 0, 0)
            assert size <= 65507
            datagram = await _receive_exactly(stream, size)
            if port == SILENT:
                self.heard.append(datagram)
            else:
                await stream.send_all(header + datagram)


async def _receive_exactly(stream: VsockStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = await stream.receive_some(size - len(data))
        if not chunk:
            raise trio.BrokenResourceError("the guest has closed")
        data += chunk
    return data


@cache
def program() -> bytes:
    """``guest_programs/outside.c``, static."""
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl", "-static"]
    options = ["-D_GNU_SOURCE", "-Os", "-s", "-Wall", "-Wextra", "-Werror"]
    compiled = ["-o", "/dev/stdout", str(_PROGRAM)]
    return subprocess.run([*compiler, *options, *compiled], capture_output=True, check=True).stdout


@asynccontextmanager
async def guest(image: Image, cmdline: str = "") -> AsyncIterator[tuple[Vm, Outside]]:
    """A VM with the program as ``/outside``, served by an :class:`Outside` alone.

    :param cmdline: for its kernel, if it boots.
    """
    plan = await plan_start(image, VmConfig())
    plan = attrs.evolve(plan, spec=attrs.evolve(plan.spec, cmdline=cmdline))
    # Compiling takes minutes on a busy host, which says nothing about the guest.
    executable = await trio.to_thread.run_sync(program)
    with trio.fail_after(PATIENCE):
        async with (
            launch(plan) as (client, network),
            trio.open_nursery() as nursery,
        ):
            outside = Outside()
            # That of the server, which is not started.
            nursery.start_soon(trio.serve_listeners, outside.serve, [network.egress._listener])
            vm = Vm._create(RunningVm(plan, client, network), image)
            await vm.write_file("/outside", executable, mode=0o755)
            yield vm, outside
            nursery.cancel_scope.cancel()


async def run(vm: Vm, *words: str) -> list[str]:
    """The lines that the program says."""
    done = await vm.run_process(["/outside", *words], capture_stdout=True, check=False)
    return done.stdout.decode(errors="replace").splitlines()
