"""The real agent as an ordinary process: the guest of a machine that needs no hypervisor."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import final

import trio

from trio_supermachine.agent import greeting
from trio_supermachine.agent.client import AgentClient
from trio_supermachine.hv.base import MachineSpec
from trio_supermachine.hv.fake import FakeEngine, FakeGuest

from .guest_client import agent_program


@final
class AgentProcess:
    """Guest of a fake machine with a raw channel. Its execs and files are those of this host.

    The machine's end kills the process.
    """

    def __init__(self) -> None:
        self._process: trio.Process | None = None
        self.started = trio.Event()

    async def __call__(self, guest: FakeGuest) -> None:
        with guest.channel as channel:
            process = self._process = await trio.lowlevel.open_process(
                [str(agent_program()), "--agent-on-fd", str(channel.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[channel.fileno()],
            )
        self.started.set()
        try:
            await process.wait()
            guest.end("shutdown")
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    @property
    def _running(self) -> trio.Process:
        assert self._process is not None, "the agent has not started"
        return self._process

    def kill(self) -> None:
        self._running.kill()

    def open_fds(self) -> int:
        return len(os.listdir(f"/proc/{self._running.pid}/fd"))

    def resident_kib(self) -> int:
        status = Path(f"/proc/{self._running.pid}/status").read_text()
        (rss,) = (line.split()[1] for line in status.splitlines() if "VmRSS" in line)
        return int(rss)


@asynccontextmanager
async def open_agent() -> AsyncIterator[tuple[AgentClient, AgentProcess]]:
    """Run an agent that is set up, for a block."""
    agent = AgentProcess()
    async with FakeEngine(agent, raw_channel=True).open(MachineSpec()) as machine:
        client = AgentClient(machine)
        await client.set_up(greeting.Setup(seed=bytes(32), hostname="tester", layers=0))
        await agent.started.wait()  # it may have answered before its start was told here
        yield client, agent
