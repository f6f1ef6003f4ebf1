"""One machine that QEMU runs.

Theory of operation. A machine is a process with three socket pairs: *qmp* controls it, *console* is
its serial port, *vsock* carries the agent's packets.

*The start.* A boot begins as the process does. A restore is, in this order:

1. QEMU stands still with its memory mapped from the snapshot's file.
2. The pages of diffs are written into that memory. Devices look at their rings in it when they are
   loaded, so it must be complete.
3. ``migrate-incoming`` begins to load the device state. QEMU remembers a ``cont`` that comes
   meanwhile; :meth:`QemuMachine.resume` waits for the event RESUME, which says that the guest runs.
   A state that cannot be loaded ends the process instead.

The muxer's first packet tells the guest's agent that its connections are gone.

*A capture* holds at each step what the steps before it have made still: the caller's ``at_rest``
freezes programs by calls to the agent; then the carrier falls silent (:mod:`~...vsock.framing`),
for which the agent must still run; then ``stop``, the device state into a descriptor that QEMU is
handed, and the memory by :mod:`..copying`, which reads it from outside. However this ends, the
vCPUs go on, unless they were paused before; then the carrier, then the programs.

*The end.* The process ends by itself (the guest's power-off, a reset, a crash) or is killed: by the
owner, or because a channel has failed. :meth:`QemuMachine._run` waits for that, gives the channels
a second to be read to their ends, and then tells in one step how it ended: the exit is known, the
console ends, streams break. The reason is the first of these that there is: the guest's own, as
QMP's event SHUTDOWN has it; a fault of a channel; the one given to :meth:`QemuMachine.kill`; the
signal or status that the process ended by.

A call that fails because the machine is going waits for that moment, so that it can say why.

*Ownership.* The engine's ``open`` owns the task :meth:`QemuMachine._run`. It is shielded, so that
clean-up of the block's body can still call the guest; leaving the block kills the process, which
ends the task.

*A hostile guest* may have taken over QEMU: what comes from a channel is bounded and checked, and
nonsense ends the machine.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    suppress,
)
from pathlib import Path
from typing import Any, Final, TypeVar, final

import trio

from ..._util.nursery import open_flat_nursery
from ...errors import CaptureFailed, SnapshotInvalid, VmExited
from ...vsock.carrier import SocketCarrier
from ...vsock.packet import VsockProtocolError
from ...vsock.stream import VsockListener, VsockMux, VsockStream
from ..base import Captured, ExitReason, Machine, MachineExit, Restore
from ..console import ConsoleRing
from ..copying import Copying, ProcessMemory, new_file
from .process import REAP_TIMEOUT, EngineProcess
from .qmp import QmpClient, QmpError, QmpProtocolError

_T = TypeVar("_T")

_RECEIVE: Final = 64 * 1024
#: Seconds that channels may stay open when the process is dead, and the process when a channel has
#: ended.
_GRACE: Final = 1.0
#: Seconds that the guest's agent may take to come to rest for a capture.
_REST: Final = 5.0
_GONE: Final = (trio.BrokenResourceError, QmpError)

#: Causes of QMP's SHUTDOWN event.
_SHUTDOWN_CAUSES: Final[Mapping[str, ExitReason]] = {
    "guest-shutdown": "shutdown",
    "guest-reset": "reset",
    "guest-panic": "reset",
    "subsystem-reset": "reset",
    "host-signal": "killed",
}


@final
class QemuMachine(Machine):
    """A machine that QEMU runs. Only :meth:`QemuEngine.open` makes one."""

    engine = "qemu"

    def __init__(
        self,
        process: EngineProcess,
        *,
        qmp: socket.socket,
        console: socket.socket,
        vsock: socket.socket,
        memory_size: int,
        restore: Restore | None,
        state_fd: int | None,
    ) -> None:
        self.console: ConsoleRing = ConsoleRing()
        self._process = process
        self._memory_size = memory_size
        self._restore = restore
        self._state_fd = state_fd  # QEMU's
        self._memory: ProcessMemory | None = None
        self._paused = False
        self._running = trio.Event()
        self._qmp = QmpClient(_stream(qmp), self._on_event)
        self._console_stream = _stream(console)
        self._mux = VsockMux(SocketCarrier(vsock))
        if restore is not None:
            self._mux.reset_peer()
        self._killed_for: ExitReason | None = None
        self._cause: str | None = None
        self._fault: str | None = None
        self._was_killed = False  # by somebody else; a state that is damaged may crash it
        self._exit: MachineExit | None = None
        self._gone = trio.Event()  # the process has ended
        self._exited = trio.Event()  # and its channels are read
        self._scope = trio.CancelScope(shield=True)

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        return self._process.pid

    async def dial(self, port: int, opening: bytes = b"") -> VsockStream:
        return await self._or_exited(self._mux.dial, port, opening)

    def listen(self, port: int) -> trio.abc.Listener[VsockStream]:
        return _Listener(self, self._mux.listen(port))

    async def pause(self) -> None:
        self._paused = True
        await self._or_exited(self._qmp.execute, "stop")

    async def resume(self) -> None:
        self._paused = False
        if self._restore is None or self._running.is_set():
            await self._or_exited(self._qmp.execute, "cont")
            return
        with suppress(VmExited):  # QEMU remembers it while it loads the state
            await self._or_exited(self._qmp.execute, "cont")
        await self._running.wait()
        if self._exit is not None:
            if self._was_killed:
                raise self._vm_exited()
            reason = f"QEMU cannot load it: {self._exit.detail}; make the snapshot again"
            raise SnapshotInvalid(str(self._restore.state), reason)

    async def capture(
        self,
        state: Path,
        memory: Path,
        *,
        at_rest: AbstractAsyncContextManager[None],
        since: str | None = None,
    ) -> Captured:
        guest = await self._guest_memory()
        with new_file(state) as state_fd, new_file(memory) as memory_fd:
            os.ftruncate(memory_fd, self._memory_size)
            copying = Copying.of(guest, memory_fd, self._restore, since)
            await trio.to_thread.run_sync(copying.prepare)
            async with at_rest:
                standstill = await self._or_exited(self._capture_at_rest, state_fd, copying.finish)
        return Captured(runs=copying.runs, complete=copying.whole, standstill=standstill)

    async def _capture_at_rest(
        self, state_fd: int, copy_memory: Callable[[], Awaitable[None]]
    ) -> float:
        async with AsyncExitStack() as stack:
            with trio.move_on_after(_REST) as scope:
                await stack.enter_async_context(self._mux.quiet())
            if scope.cancelled_caught:
                raise CaptureFailed(f"the guest's agent did not come to rest within {_REST:g} s")
            began = trio.current_time()
            try:
                await self._qmp.execute("stop")
                await self._save_devices(state_fd)
                await copy_memory()
            finally:
                with trio.move_on_after(REAP_TIMEOUT, shield=True), suppress(*_GONE):
                    if not self._paused:
                        await self._qmp.execute("cont")
        return trio.current_time() - began

    async def _save_devices(self, fd: int) -> None:
        """Save the device state, with which a live migration ends, into the descriptor ``fd``."""
        try:
            answer = await self._qmp.execute("add-fd", {"opaque": "state"}, fd=fd)
            number = int(answer["fdset-id"])
            file = f"/dev/fdset/{number}"
            await self._qmp.execute("xen-save-devices-state", {"filename": file, "live": False})
            await self._qmp.execute("remove-fd", {"fdset-id": number})
        except QmpError as exc:
            raise CaptureFailed(f"the machine's state was not saved: {exc.description}") from exc

    async def _guest_memory(self) -> ProcessMemory:
        if self._memory is None:
            command = {"command-line": "gpa2hva 0"}
            said = await self._or_exited(self._qmp.execute, "human-monitor-command", command)
            match = re.search(r" is (0x[0-9a-f]+)", str(said))
            if match is None:
                raise CaptureFailed(f"QEMU does not say where the guest's memory is: {said!r:.200}")
            self._memory = ProcessMemory(
                self.pid, int(match[1], 16), self._memory_size, restored=self._restore is not None
            )
        return self._memory

    async def wait_exit(self) -> MachineExit:
        await self._exited.wait()
        assert self._exit is not None
        return self._exit

    def kill(self, reason: ExitReason = "stopped") -> None:
        if self._exit is None:
            self._killed_for = self._killed_for or reason
            self._process.kill()

    async def _or_exited(self, operation: Callable[..., Awaitable[_T]], *args: object) -> _T:
        """Run ``operation``. If it breaks because the machine is gone, raise :exc:`VmExited`."""
        try:
            return await operation(*args)
        except trio.BrokenResourceError:
            await self._exited.wait()
            raise self._vm_exited() from None
        except QmpError:
            # A guest that shuts down has nothing left to stop or to run.
            if self._cause is None:
                raise
            await self._exited.wait()
            raise self._vm_exited() from None

    def _vm_exited(self) -> VmExited:
        assert self._exit is not None
        return VmExited(self._exit.reason, self._exit.detail, console=self.console.text_tail())

    # --- the machine's life, in tasks that the engine's ``open`` owns ---

    async def _start(self) -> None:
        """Wait until the machine runs, or has begun to load its state.

        :raises VmExited: QEMU refused.
        """
        await self._or_exited(self._qmp.negotiate)
        if self._restore is None:
            return
        if self._restore.patches:
            memory = await self._guest_memory()
            await trio.to_thread.run_sync(memory.patch, self._restore.patches)
        uri = {"uri": f"fd:{self._state_fd}"}
        await self._or_exited(self._qmp.execute, "migrate-incoming", uri)

    def _end_within(self, seconds: float) -> None:
        self.kill()
        self._scope.deadline = trio.current_time() + seconds

    async def _run(self) -> None:
        """Serve the machine's channels until its process is gone, and tell how it ended."""
        status: int | None = None
        try:
            with self._scope:
                async with open_flat_nursery() as nursery:
                    nursery.start_soon(self._serve_console)
                    nursery.start_soon(self._serve_qmp)
                    nursery.start_soon(self._serve_vsock)
                    nursery.start_soon(self._process.drain_stderr)
                    status = await self._process.wait()
                    self._gone.set()
                    # Bytes that it wrote before its end are still to be read.
                    nursery.cancel_scope.deadline = trio.current_time() + _GRACE
        finally:
            self._exit = self._how_it_ended(status)
            self.console.end()
            self._mux.close(self._vm_exited)
            self._exited.set()
            self._running.set()

    async def _serve_console(self) -> None:
        try:
            while data := await self._console_stream.receive_some(_RECEIVE):
                self.console.feed(data)
        except trio.BrokenResourceError:
            pass

    async def _serve_qmp(self) -> None:
        try:
            await self._qmp.run()
        except QmpProtocolError as exc:
            self._give_up(f"QEMU's control channel: {exc}")
        else:
            await self._not_without("QEMU's control channel has ended")

    async def _serve_vsock(self) -> None:
        try:
            await self._mux.run()
        except VsockProtocolError as exc:
            self._give_up(f"the guest broke the vsock protocol: {exc}")
        else:
            await self._not_without("the guest's channel has ended")

    async def _not_without(self, fault: str) -> None:
        """End a machine that has lost a channel, unless QEMU is on its way out anyway."""
        with trio.move_on_after(_GRACE) as scope:
            await self._gone.wait()
        if scope.cancelled_caught:
            self._give_up(fault)

    def _give_up(self, fault: str) -> None:
        self._fault = fault
        self._process.kill()

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._cause = str(data.get("reason", ""))
        elif name == "RESUME":
            self._running.set()

    def _how_it_ended(self, status: int | None) -> MachineExit:
        if self._cause is not None and self._cause in _SHUTDOWN_CAUSES:
            return MachineExit(
                reason=_SHUTDOWN_CAUSES[self._cause], detail=self.console.last_words()
            )
        if self._fault is not None:
            return MachineExit(reason="failed", detail=self._fault)
        if self._killed_for is not None:
            return MachineExit(reason=self._killed_for)
        if status is not None and status < 0:
            self._was_killed = status == -signal.SIGKILL
            return MachineExit(reason="killed", detail=f"QEMU was killed by signal {-status}")
        detail = self._process.stderr_tail or f"QEMU left with status {status}"
        return MachineExit(reason="failed", detail=detail)


@final
class _Listener(trio.abc.Listener[VsockStream]):
    def __init__(self, machine: QemuMachine, inner: VsockListener) -> None:
        self._machine = machine
        self._inner = inner

    async def accept(self) -> VsockStream:
        return await self._machine._or_exited(self._inner.accept)

    async def aclose(self) -> None:
        await self._inner.aclose()


def _stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
