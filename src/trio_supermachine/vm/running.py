"""One running VM: its machine, its agent, its connections, and how it ends.

:class:`RunningVm` is the one state that every :class:`Vm` of the same machine looks at. It ends in
one of three ways, and each time its block has left nothing behind when it is over:

- The block is left. The nursery is cancelled and the machine is killed.
- :meth:`RunningVm.stop` is called. The block goes on, and calls to the guest raise `VmExited`.
- The machine ends by itself. The body of the block is cancelled, and the block raises `VmExited`.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Final, final

import trio

from .._util.nursery import open_flat_nursery
from .._util.trace import trace
from ..agent import wire
from ..agent.client import AgentClient, exited
from ..agent.wire import ExecRequest, Exit
from ..errors import ExecEof, NotSupported, VmExited
from ..hv.base import Console, Machine
from ..net.network import VmNetwork
from ..programs.running import RunningExec, open_exec
from ..snapshots import Snapshot
from .capture import capture
from .launch import launch
from .plan import Plan

_LISTENER_MS: Final = 3_600_000  # milliseconds that one call to the agent waits
_POWER_OFF: Final = 2.0  # seconds for the guest kernel to power off, beyond the grace


@final
class RunningVm:
    """The state of one running VM. :func:`open_vm` makes it.

    :ivar plan: the plan that it was started by.
    :ivar client: talks to the guest's agent.
    :ivar network: forwards, unix sockets, and the guest's way out.
    """

    def __init__(self, plan: Plan, client: AgentClient, network: VmNetwork) -> None:
        self.plan = plan
        self.client = client
        self.network = network
        self._machine: Machine = client.machine
        self._capturing = trio.Lock()
        self._body = trio.CancelScope()
        self._stopping = False
        self._exited: VmExited | None = None

    @property
    def engine(self) -> str:
        """The name of the engine that runs it."""
        return self._machine.engine

    @property
    def console(self) -> Console:
        """The guest's console."""
        return self._machine.console

    @property
    def exited(self) -> VmExited | None:
        """Why it has ended; ``None`` while it runs."""
        return self._exited

    @property
    def usable(self) -> bool:
        """Whether it runs, and nobody has asked it to stop."""
        return self._exited is None and not self._stopping

    def open_exec(self, request: ExecRequest) -> AbstractAsyncContextManager[RunningExec]:
        """Run a program for the length of a block."""
        return open_exec(self.client, request)

    async def ping(self) -> None:
        """Return when the guest's agent has answered."""
        await self.client.call(wire.frame(wire.FrameType.PING))

    async def start_workload(self) -> None:
        """Start the image's workload in a VM whose plan left it out.

        :raises OSError: (``EBUSY``) there is or was one.
        """
        await self.client.call(wire.workload_start(self.plan.image.config.argv))

    async def wait_workload(self) -> int:
        """Wait for the end of the workload; give its return code."""
        request = wire.frame(wire.FrameType.WORKLOAD_WAIT)
        return (await self.client.call_for(request, Exit.decode)).returncode

    async def wait_listening(self, port: int = 0) -> int:
        """Wait until something listens on a TCP port, or with 0 on any; give the port."""
        while True:
            request = wire.await_listener(_LISTENER_MS, port)
            if found := await self.client.call_for(request, wire.decode_u64):
                return found

    async def pause(self) -> None:
        """Stop the guest's CPUs, and hold back calls to the guest. Idempotent.

        A capture that is under way is waited for: it has to thaw the guest's programs.
        """
        if self.client.holding:
            await trio.lowlevel.checkpoint()
            return
        async with self._capturing:
            await self._machine.pause()
            self.client.hold()

    async def resume(self) -> None:
        """Let the guest's CPUs run again, and set its clock. Idempotent."""
        await self._machine.resume()
        self.client.release()
        await self.client.call(wire.set_clock(time.time_ns()))

    async def capture(
        self,
        dest: str | os.PathLike[str],
        *,
        base: Snapshot | None = None,
        fingerprint: str | None = None,
        workload_started: bool = True,
    ) -> Snapshot:
        """Write a snapshot to ``dest``; captures of one VM wait for each other.

        :param base: write only the memory that differs from this.
        :param fingerprint: the fingerprint of the bake that the snapshot belongs to.
        :param workload_started: whether the image's workload has been started by now.
        """
        if self.plan.spec.devices:
            raise NotSupported("snapshot", "a VM with devices of the program's own has no snapshot")
        async with self._capturing:
            return await capture(
                self.client,
                self.plan,
                dest,
                base=base,
                fingerprint=fingerprint,
                workload_started=workload_started,
            )

    async def stop(self, grace: float) -> None:
        """Shut the guest down in order, within ``grace`` seconds, and wait for its end.

        Cancelled, it kills the machine.
        """
        self._stopping = True
        try:
            with trio.move_on_after(grace + _POWER_OFF):
                with suppress(OSError, VmExited, ExecEof):
                    answer = await self.client.call(wire.shutdown(round(grace * 1000)))
                    if answer.payload == wire.ALL_IS_WRITTEN:
                        self._machine.kill("shutdown")
                await self._machine.wait_exit()
        finally:
            self._machine.kill()
        await self._wait_end()

    async def _wait_end(self) -> None:
        """Wait until the machine has ended, and tell everything that waits for this VM."""
        exit_ = await self._machine.wait_exit()
        if self._exited is None:
            trace("vm", "%r exited: %s", self.plan.image, exit_.reason)
            self._exited = exited(exit_, self._machine)
            self.network.end(self._exited)
            self.client.release()

    async def _watch(self) -> None:
        await self._wait_end()
        if not self._stopping:
            self._body.cancel()

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[None]:
        """Run the tasks of this VM beside a body; the VM's own end cancels the body."""
        try:
            async with open_flat_nursery() as nursery:
                nursery.start_soon(self._watch)
                await nursery.start(self.network.run)
                with self._body:
                    yield
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # Tasks of the body that were in calls to the guest all raise the same.
            if self._exited is not None and group.split((VmExited, trio.Cancelled))[1] is None:
                raise self._exited from None
            raise
        if self._body.cancelled_caught and self._exited is not None:
            raise self._exited


@asynccontextmanager
async def open_vm(plan: Plan) -> AsyncIterator[RunningVm]:
    """Carry out a plan: a block, entered when the guest has answered, left when nothing remains.

    Errors are those of :func:`~.launch.launch`. :raises VmExited: the VM ended during the block.
    """
    async with launch(plan) as (client, network):
        running = RunningVm(plan, client, network)
        async with running._run():
            yield running
