"""One machine that this process runs itself.

Theory of operation. A machine is a :class:`~.board.Board` of hardware, a thread for each vCPU, and
tasks in the Trio thread: one for each vCPU's thread, one for each virtio device, and the muxer's.

*Standing still* is needed for a pause and for a capture, in this order: vCPUs first, so that
devices have no more coming in; then the devices, which finish what they have begun. It is shielded:
half of it is nothing to go on from, as a call to KVM about a vCPU that runs would block, perhaps
for ever. Going on is the reverse, and plain. ``_moving`` is held while they come to stand, so that
nothing is told to go meanwhile.

*A pause and a capture may overlap.* Each has a flag (``_paused``, ``_capturing``). A resume during
a capture only clears its flag; the capture lets the machine go on at its end, if it is not paused.

*A capture*: the caller's ``at_rest`` freezes the guest's programs; then the muxer is quiet, so that
nothing is said to the guest that its copies would hear, too; then the machine stands, and its state
and memory are written. Afterwards the guest is told that it stood still, lest its watchdogs
complain.

*The end* has a cause, of which the first counts: a guest's power register, the end of a vCPU, a
refusal of the kernel's, :meth:`KvmMachine.kill`. It stops all vCPUs. When their threads have ended,
the rest follows in one step: the console's last bytes, the exit, the ends of console and streams.
Only then are tasks cancelled, so that those who wait hear how the machine ended.

*Ownership.* The engine's ``open`` owns the task :meth:`KvmMachine.run`, which is shielded so that
clean-up of the block's body can still call the guest. Afterwards the hardware is given back in a
thread.

*Threads.* Exits are handled in vCPUs' threads with the board's lock held. What they have for the
Trio thread (console bytes, the end, news for a device) goes through the Trio token; the console's
bytes on their way are bounded.
"""

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
    """Way of the console's bytes from the vCPUs' threads to the ring in the Trio thread."""

    def __init__(self, ring: ConsoleRing) -> None:
        self._ring = ring
        self._token = trio.lowlevel.current_trio_token()
        self._waiting = bytearray()

    def write(self, data: bytes) -> None:
        """Take bytes, in a vCPU's thread; drop those that the ring would not keep."""
        waiting = self._waiting
        waiting.extend(data)
        if len(waiting) > 2 * RING_BYTES:
            del waiting[:-RING_BYTES]
        self._token.run_sync_soon(self.flush, idempotent=True)

    def flush(self) -> None:
        """Feed the ring, in the Trio thread."""
        # Each step is atomic: bytes that come in between stay for the next call.
        data = bytes(self._waiting)
        del self._waiting[: len(data)]
        if data:
            self._ring.feed(data)


@final
class KvmMachine(Machine):
    """A machine that this process runs. Only :meth:`KvmEngine.open` makes one."""

    engine = "kvm"

    def __init__(self, spec: MachineSpec) -> None:
        self.console: ConsoleRing = ConsoleRing()
        self._feed = ConsoleFeed(self.console)
        self._spec = spec
        self._made: Board | None = None
        self._paused = spec.restore is not None
        self._moving = trio.Lock()  # held while vCPUs and devices come to stand
        self._capturing = False
        self._cause: MachineExit | None = None
        self._exit: MachineExit | None = None
        self._exited = trio.Event()
        self._vcpus: tuple[VcpuThread, ...] = ()

    async def set_up(self) -> None:
        """Make the hardware; a cancellation takes effect afterwards. Call :meth:`close` in any
        case.

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
        """Give the hardware back. :meth:`run` has ended or was never called.

        It blocks for some milliseconds: call it in a thread.
        """
        if self._made is not None:
            self._made.close()

    @property
    def _board(self) -> Board:
        assert self._made is not None, "not set up"
        return self._made

    @property
    def exits(self) -> dict[str, int]:
        """Counts of the exits of all vCPUs, by reason."""
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
        """Bring vCPUs and devices to stand. Shielded; it takes a moment only."""
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

    # --- the machine's life, in tasks that the engine's ``open`` owns, and in vCPUs' threads ---

    def power(self, event: PowerEvent) -> None:
        """End the machine as the guest wants it. Called in a vCPU's thread."""
        self._end(MachineExit(reason=event))

    def _end(self, cause: MachineExit) -> None:
        if self._cause is None:
            self._cause = cause
        for vcpu in self._vcpus:
            vcpu.stop()

    async def run(self) -> None:
        """Run the machine until it ends by itself or by :meth:`kill`, and tell how it ended."""
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
        """Tell all that wait for the machine how it has ended. Idempotent."""
        if self._exit is not None:
            return
        self._board.flush_console()
        self._feed.flush()
        cause = self._cause or MachineExit(reason="failed", detail="the engine broke off")
        self._exit = attrs.evolve(cause, detail=self.console.last_words() or cause.detail)
        self.console.end()
        # In one step: whoever sees a broken stream can ask why, and is answered.
        self._board.mux.close(self._vm_exited)
        self._exited.set()

    async def _run_vcpu(self, vcpu: VcpuThread) -> None:
        try:
            exit_ = await vcpu.run()
        except OSError as exc:  # the kernel refused something that a device needs
            self._end(MachineExit(reason="failed", detail=str(exc)))
            return
        trace("kvm", "a vCPU has ended: %s %s", exit_.end, exit_.detail)
        if exit_.end != "stopped":
            self._end(MachineExit(reason=_ENDS[exit_.end], detail=exit_.detail))


def _write(fd: int, make: Callable[[], bytes]) -> None:
    with open(fd, "wb", closefd=False) as file:
        file.write(make())
