"""The real agent as an ordinary process, and the host's real side of it: all but the machine."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import final

import trio

from trio_supermachine.agent import greeting
from trio_supermachine.agent.client import AgentClient
from trio_supermachine.hv.base import Captured, Console, ExitReason, Machine, MachineExit
from trio_supermachine.vsock.carrier import SocketCarrier
from trio_supermachine.vsock.stream import VsockListener, VsockMux, VsockStream

from .guest_client import agent_program


class _NoConsole(Console):
    def tail(self, max_bytes: int = 4096) -> bytes:
        return b""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        await trio.lowlevel.checkpoint()
        for _ in ():
            yield b""


@final
class AgentMachine(Machine):
    """As much of a machine as its channel: an ordinary process cannot be paused or captured."""

    engine = "process"
    console = _NoConsole()

    def __init__(self, mux: VsockMux, process: trio.Process) -> None:
        self.mux = mux
        self.process = process

    async def dial(self, port: int, opening: bytes = b"") -> VsockStream:
        return await self.mux.dial(port, opening)

    def listen(self, port: int) -> VsockListener:
        return self.mux.listen(port)

    async def pause(self) -> None:
        raise NotImplementedError

    async def resume(self) -> None:
        raise NotImplementedError

    async def capture(
        self,
        state: Path,
        memory: Path,
        *,
        at_rest: AbstractAsyncContextManager[None],
        since: str | None = None,
    ) -> Captured:
        raise NotImplementedError

    async def wait_exit(self) -> MachineExit:
        await self.process.wait()
        return MachineExit(reason="shutdown", detail="")

    def kill(self, reason: ExitReason = "stopped") -> None:
        self.process.kill()

    def open_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (rss,) = (line.split()[1] for line in status.splitlines() if "VmRSS" in line)
        return int(rss)


@asynccontextmanager
async def open_agent() -> AsyncIterator[tuple[AgentClient, AgentMachine]]:
    """An agent that was set up, over a socket pair in the place of a serial port."""
    ours, theirs = socket.socketpair()
    mux = VsockMux(SocketCarrier(ours))
    try:
        with theirs:
            fd = theirs.fileno()
            command = [str(agent_program()), "--agent-on-fd", str(fd)]
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.DEVNULL, pass_fds=[fd]
            )
        machine = AgentMachine(mux, process)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mux.run)
                client = AgentClient(machine)
                await client.set_up(greeting.Setup(seed=bytes(32), hostname="tester", layers=0))
                yield client, machine
                nursery.cancel_scope.cancel()
        finally:
            mux.close()  # which ends the agent
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 60):
                await process.wait()
    finally:
        mux.close()
