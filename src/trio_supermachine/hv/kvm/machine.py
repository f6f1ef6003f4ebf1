"""One machine that this process runs itself."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, final

import attrs
import trio

from ..._util.nursery import open_flat_nursery
from ..._util.trace import trace
from ...devices.power import PowerEvent
from ...devices.virtio import VirtioDevice
from ...errors import ConfigError, SnapshotInvalid, VmExited
from ...vsock.stream import VsockStream
from ..base import Captured, ExitReason, Machine, MachineExit, MachineSpec
from ..console import RING_BYTES, ConsoleRing
from ..copying import Copying, new_file
from .board import Board
from .vcpu import VcpuEnd, VcpuThread

_ENDS: Final[dict[VcpuEnd, ExitReason]] = {
    "shutdown": "shutdown",
    "reset": "reset",
    "halted": "failed",
    "failed": "failed",
}


@final
class ConsoleFeed:
    """Brings the console's bytes from the vCPUs' threads to its ring in the Trio thread."""

    def __init__(self, ring: ConsoleRing) -> None:
        self._ring = ring
        self._token = trio.lowlevel.current_trio_token()
        self._waiting = bytearray()

    def write(self, data: bytes) -> None:
        """Called in a vCPU's thread. What the ring would not keep is not kept here."""
        waiting = self._waiting
        waiting.extend(data)
        if len(waiting) > 2 * RING_BYTES:
            del waiting[:-RING_BYTES]
        self._token.run_sync_soon(self.flush, idempotent=True)

    def flush(self) -> None:
        # Each step is atomic, and what comes in between stays for the next call.
        data = bytes(self._waiting)
        del self._waiting[: len(data)]
        if data:
            self._ring.feed(data)


@final
class KvmMachine(Machine):
    """Only :meth:`KvmEngine.open` makes one."""

    engine = "kvm"

    def __init__(self, spec: MachineSpec) -> None:
        self.console: ConsoleRing = ConsoleRing()
        self._feed = ConsoleFeed(self.console)
        self._spec = spec
        self._made: Board | None = None
        self._paused = spec.restore is not None
        self._moving = trio.Lock()  # a vCPU cannot be told to go while it is waited for to stand
        self._capturing = False
        self._cause: MachineExit | None = None
        self._exit: MachineExit | None = None
        self._exited = trio.Event()
        self._vcpus: tuple[VcpuThread, ...] = ()

    async def set_up(self) -> None:
        """Make the hardware. Cancelled, it does so first; :meth:`close` in any case.

        :raises SnapshotInvalid: this host's KVM does not take the state to go on from.
        :raises VmExited: KVM refused to make the machine.
        """
        restore = self._spec.restore
        own = tuple(make() for make in self._spec.devices)
        try:
            await trio.to_thread.run_sync(self._make_board, own)
        except (FileNotFoundError, ConfigError):
            raise
        except (OSError, ValueError) as exc:
            if restore is None:
                raise VmExited("failed", str(exc)) from exc
            reason = f"KVM cannot load it: {exc}; make the snapshot again"
            raise SnapshotInvalid(str(restore.state), reason) from exc
        self._vcpus = tuple(
            VcpuThread(vcpu, self._board.handlers, standing=self._paused)
            for vcpu in self._board.vcpus
        )
        if not self._paused:
            for device in self._board.devices:
                device.release()

    def _make_board(self, own: tuple[VirtioDevice, ...]) -> None:
        self._made = Board(self._spec, own, console=self._feed.write, power=self.power)

    def close(self) -> None:
        """Give the hardware back; :meth:`run` has ended or was never called.

        The kernel takes some milliseconds for it: call it in a thread.
        """
        if self._made is not None:
            self._made.close()

    @property
    def _board(self) -> Board:
        assert self._made is not None, "not set up"
        return self._made

    @property
    def exits(self) -> dict[str, int]:
        """How often a vCPU has left the guest for this program, by reason."""
        counts: dict[str, int] = {}
        for vcpu in self._vcpus:
            for reason, count in vcpu.exits.items():
                counts[reason] = counts.get(reason, 0) + count
        return counts

    async def dial(self, port: int, opening: bytes = b"") -> VsockStream:
        return await self._board.mux.dial(port, opening)

    def listen(self, port: int) -> trio.abc.Listener[VsockStream]:
        return self._board.mux.listen(port)

    async def pause(self) -> None:
        async with self._moving:
            self._paused = True
            await self._stand()
        self._check_alive()

    async def resume(self) -> None:
        async with self._moving:
            self._paused = False
            if not self._capturing:
                self._go_on()
        self._check_alive()

    async def _stand(self) -> None:
        """vCPUs first: then the devices have no more coming in, and finish what they have.

        Shielded, for it takes a moment only, and half of it is nothing to go on from: a call to
        KVM about a vCPU that runs would block, if need be for ever.
        """
        with trio.CancelScope(shield=True):
            for vcpu in self._vcpus:
                await vcpu.pause()
            for device in self._board.devices:
                await device.hold()

    def _go_on(self) -> None:
        for device in self._board.devices:
            device.release()
        for vcpu in self._vcpus:
            vcpu.resume()

    async def capture(
        self,
        state: Path,
        memory: Path,
        *,
        at_rest: AbstractAsyncContextManager[None],
        since: str | None = None,
    ) -> Captured:
        self._check_alive()
        with new_file(state) as state_fd, new_file(memory) as memory_fd:
            os.ftruncate(memory_fd, self._board.memory.size)
            copying = Copying.of(self._board.memory.pages, memory_fd, self._spec.restore, since)
            await trio.to_thread.run_sync(copying.prepare)
            # In the innermost block nothing is said to the guest that its copies would hear, too.
            async with at_rest, self._board.mux.quiet():
                standstill = await self._capture_at_rest(state_fd, copying.finish)
        return Captured(runs=copying.runs, complete=copying.whole, standstill=standstill)

    async def _capture_at_rest(
        self, state_fd: int, copy_memory: Callable[[], Awaitable[None]]
    ) -> float:
        began = trio.current_time()
        self._capturing = True
        stood = False
        try:
            async with self._moving:
                await self._stand()
            stood = True
            self._check_alive()
            await trio.to_thread.run_sync(_write, state_fd, self._board.save)
            await copy_memory()
        finally:
            self._capturing = False
            if not self._paused:
                if stood:
                    self._board.stood_still()
                self._go_on()
        return trio.current_time() - began

    async def wait_exit(self) -> MachineExit:
        await self._exited.wait()
        assert self._exit is not None
        return self._exit

    def kill(self, reason: ExitReason = "stopped") -> None:
        self._end(MachineExit(reason=reason))

    def _check_alive(self) -> None:
        if self._cause is not None:
            raise self._vm_exited()

    def _vm_exited(self) -> VmExited:
        exit_ = self._exit or self._cause
        assert exit_ is not None
        return VmExited(exit_.reason, exit_.detail, console=self.console.text_tail())

    # The machine's life. All below runs in tasks that the engine's ``open`` owns, but for what
    # vCPUs' threads call.

    def power(self, event: PowerEvent) -> None:
        """The guest wants to end; called in a vCPU's thread."""
        self._end(MachineExit(reason=event))

    def _end(self, cause: MachineExit) -> None:
        if self._cause is None:
            self._cause = cause
        for vcpu in self._vcpus:
            vcpu.stop()

    async def run(self) -> None:
        """Run the machine until it ends by itself or by :meth:`kill`, and tell how it did.

        Shielded: while the owner is being cancelled, calls to the guest that clean up still go
        through; the owner ends this by killing the machine.
        """
        try:
            with trio.CancelScope(shield=True):
                async with open_flat_nursery() as nursery:
                    nursery.start_soon(self._board.mux.run)
                    for device in self._board.devices:
                        nursery.start_soon(device.serve)
                    async with open_flat_nursery() as vcpus:
                        for vcpu in self._vcpus:
                            vcpus.start_soon(self._run_vcpu, vcpu)
                    self._tell_end()
                    nursery.cancel_scope.cancel()
        finally:
            self._tell_end()

    def _tell_end(self) -> None:
        """End what others wait for, before its tasks are cancelled and can only say so."""
        if self._exit is not None:
            return
        self._board.flush_console()
        self._feed.flush()
        cause = self._cause or MachineExit(reason="failed", detail="the engine broke off")
        self._exit = attrs.evolve(cause, detail=self.console.last_words() or cause.detail)
        self.console.end()
        # All at once: who asks why a stream broke finds the answer.
        self._board.mux.close(self._vm_exited)
        self._exited.set()

    async def _run_vcpu(self, vcpu: VcpuThread) -> None:
        try:
            exit_ = await vcpu.run()
        except OSError as exc:  # KVM, or the system, refused what a device needs
            self._end(MachineExit(reason="failed", detail=str(exc)))
            return
        trace("kvm", "a vCPU has ended: %s %s", exit_.end, exit_.detail)
        if exit_.end != "stopped":
            self._end(MachineExit(reason=_ENDS[exit_.end], detail=exit_.detail))


def _write(fd: int, make: Callable[[], bytes]) -> None:
    with open(fd, "wb", closefd=False) as file:
        file.write(make())
