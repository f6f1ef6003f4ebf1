"""A vCPU's thread: it runs the guest, and answers its exits, until it is told to stand or stop.

Theory of operation. KVM_RUN runs the guest in the calling thread until the guest needs an answer
(an access to a port or to a register in memory), ends, or the thread is interrupted. A task cannot
wait for that, so each vCPU has a thread, and a task that owns it: :meth:`VcpuThread.run`.

Three wishes come from the Trio thread, or from any other: *run*, *stand* (:meth:`VcpuThread.pause`)
and *stop*. Under a lock the wish is noted; then the thread is kicked:

1. ``immediate_exit`` is set, so that KVM_RUN returns at once if it is entered from now on.
2. A signal is sent, which interrupts a KVM_RUN that has begun.

In whichever order these meet the thread, it returns with "interrupted". Only then does it look at
the wish, and not behind an access: the kernel completes an access when KVM_RUN is entered *again*,
so a vCPU that stood before that would have half an access in its state. ``immediate_exit`` is
cleared under the same lock, so that no wish is lost.

A thread that stands says so to the tasks that wait, through the Trio token, and waits for the next
wish. However it ends, it stands by then; the vCPU may be closed.

The signal is a real-time one that nothing else in the program uses, with a handler in C that does
nothing. The thread unblocks it for itself.

*A hostile guest* chooses ports, addresses, sizes and values, and how often it exits. Handlers are
called in the vCPU's thread, one exit at a time. A handler that raises is a bug and ends the task.
"""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, final

import attrs
import trio

from ._kvm import ffi, lib
from .api import KvmVcpu

if TYPE_CHECKING:
    import outcome

_INTERRUPTED: Final = (-errno.EINTR, -errno.EAGAIN)
_MASKS: Final = tuple((1 << 8 * size) - 1 for size in range(9))
_REASONS: Final = {
    lib.KVM_EXIT_IO: "port",
    lib.KVM_EXIT_MMIO: "memory",
    -errno.EINTR: "interrupted",
    -errno.EAGAIN: "interrupted",
}

VcpuEnd = Literal["stopped", "shutdown", "reset", "halted", "failed"]


@attrs.frozen
class VcpuExit:
    """End of a vCPU.

    :ivar end: ``"stopped"`` by :meth:`VcpuThread.stop`; ``"reset"`` by a triple fault or as the
        system's event; ``"shutdown"`` likewise; ``"halted"`` without an interrupt controller that
        could wake it; ``"failed"``: KVM cannot run it.
    :ivar detail: for people.
    """

    end: VcpuEnd
    detail: str = ""


@attrs.frozen(kw_only=True)
class ExitHandlers:
    """Functions that answer a guest's exits, called in the thread of the vCPU.

    Arguments are the port or the guest-physical address, the size in bytes (1, 2 or 4 for a port;
    1 to 8 for memory, of any alignment), and the value, little-endian. The lowest ``size`` bytes of
    a result count. A repeated port instruction makes one call for each item.
    """

    port_in: Callable[[int, int], int]
    port_out: Callable[[int, int, int], None]
    mmio_read: Callable[[int, int], int]
    mmio_write: Callable[[int, int, int], None]


@final
class VcpuThread:
    """One vCPU with a thread of its own, which runs once.

    :param standing: let the vCPU stand until :meth:`resume`.
    :raises OSError: the program uses all real-time signals itself, and one is needed here.
    """

    def __init__(self, vcpu: KvmVcpu, handlers: ExitHandlers, *, standing: bool = False) -> None:
        self._vcpu = vcpu
        self._handlers = handlers
        self._signal = _kick_signal()
        self._exits: dict[int, int] = {}
        # The attributes below are written with the lock held, by either side.
        self._changed = threading.Condition()
        self._wanted: Literal["run", "stand", "stop"] = "stand" if standing else "run"
        self._thread: int | None = None
        self._still = True
        self._token: trio.lowlevel.TrioToken | None = None
        self._waiters: list[trio.Event] = []

    @property
    def exits(self) -> dict[str, int]:
        """Counts of KVM_RUN's returns, by reason."""
        counts: dict[str, int] = {}
        for reason, count in self._exits.copy().items():
            name = _REASONS.get(reason, "end")
            counts[name] = counts.get(name, 0) + count
        return counts

    async def run(self) -> VcpuExit:
        """Run the guest in a thread until it ends or :meth:`stop` is called.

        A cancellation stops the vCPU. However this ends, the thread has left the vCPU by then,
        which may be closed.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        task = trio.lowlevel.current_task()
        token = self._token = trio.lowlevel.current_trio_token()

        def ended(result: outcome.Outcome[VcpuExit]) -> None:
            token.run_sync_soon(trio.lowlevel.reschedule, task, result)

        def stop(_: object) -> trio.lowlevel.Abort:
            self.stop()
            return trio.lowlevel.Abort.FAILED  # wait for the thread all the same

        trio.lowlevel.start_thread_soon(self._serve, ended, f"vcpu {self._vcpu.index}")
        result: VcpuExit = await trio.lowlevel.wait_task_rescheduled(stop)
        await trio.lowlevel.checkpoint_if_cancelled()
        return result

    async def pause(self) -> None:
        """Let the vCPU stand still, and wait until it does. Idempotent.

        Then its state is complete (no access of the guest is half done) and may be saved, from any
        thread. A cancelled call still makes it stand, a moment later.
        """
        stands = trio.Event()
        with self._changed:
            if self._wanted == "run":
                self._wanted = "stand"
            if self._still:
                stands.set()
            else:
                self._waiters.append(stands)
                self._kick()
        await stands.wait()

    def resume(self) -> None:
        """Let the vCPU run again. Idempotent; from any thread. Not while :meth:`pause` waits."""
        with self._changed:
            if self._wanted == "stand":
                self._wanted = "run"
                self._changed.notify()

    def stop(self) -> None:
        """Let :meth:`run` end. Idempotent; from any thread, that of a handler too."""
        with self._changed:
            self._wanted = "stop"
            self._changed.notify()
            self._kick()

    def _kick(self) -> None:
        if self._thread is not None and not self._still:
            self._vcpu.run.immediate_exit = 1
            signal.pthread_kill(self._thread, self._signal)

    def _serve(self) -> VcpuExit:
        # The host program may have blocked all signals, which threads inherit.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {self._signal})
        with self._changed:
            self._thread = threading.get_ident()
        try:
            return self._loop()
        finally:
            with self._changed:
                self._thread = None
                self._stand()

    def _loop(self) -> VcpuExit:
        enter, exits = self._vcpu.enter, self._exits
        port, memory = lib.KVM_EXIT_IO, lib.KVM_EXIT_MMIO
        reason = -errno.EINTR  # look at the wish first: it may have changed before the thread ran
        while True:
            if reason == port:
                self._port()
            elif reason == memory:
                self._memory()
            elif reason not in _INTERRUPTED:
                return self._end(reason)
            elif not self._go_on():
                return VcpuExit("stopped")
            reason = enter()
            exits[reason] = exits.get(reason, 0) + 1

    def _go_on(self) -> bool:
        with self._changed:
            while self._wanted == "stand":
                self._stand()
                self._changed.wait()
            if self._wanted == "stop":
                return False
            # Whoever sets it has the lock, so that no wish is lost here.
            self._vcpu.run.immediate_exit = 0
            self._still = False
            return True

    def _stand(self) -> None:
        self._still = True
        for stands in self._waiters:
            assert self._token is not None
            self._token.run_sync_soon(stands.set)
        self._waiters.clear()

    def _port(self) -> None:
        io, shared = self._vcpu.io, self._vcpu.shared
        port, size, start = io.port, io.size, io.data_offset
        items = range(start, start + size * io.count, size)
        if io.direction == lib.KVM_EXIT_IO_OUT:
            port_out = self._handlers.port_out
            for at in items:
                port_out(port, size, int.from_bytes(shared[at : at + size], "little"))
        else:
            port_in, mask = self._handlers.port_in, _MASKS[size]
            for at in items:
                value = port_in(port, size) & mask
                shared[at : at + size] = value.to_bytes(size, "little")

    def _memory(self) -> None:
        mmio = self._vcpu.mmio
        size, data = mmio.len, mmio.data
        if mmio.is_write:
            value = int.from_bytes(ffi.buffer(data, size), "little")
            self._handlers.mmio_write(mmio.phys_addr, size, value)
        else:
            value = self._handlers.mmio_read(mmio.phys_addr, size) & _MASKS[size]
            ffi.buffer(data, size)[:] = value.to_bytes(size, "little")

    def _end(self, reason: int) -> VcpuExit:
        run = self._vcpu.run
        if reason < 0:
            name = errno.errorcode.get(-reason, str(-reason))
            return VcpuExit("failed", f"KVM_RUN: {name}")
        if reason == lib.KVM_EXIT_SHUTDOWN:
            return VcpuExit("reset", "triple fault")
        if reason == lib.KVM_EXIT_HLT:
            return VcpuExit("halted", "HLT without an interrupt controller")
        if reason == lib.KVM_EXIT_SYSTEM_EVENT:
            return _system_event(lib.vcpu_system_event(run).type)
        if reason == lib.KVM_EXIT_INTERNAL_ERROR:
            return VcpuExit("failed", f"KVM's error {lib.vcpu_internal(run).suberror}")
        if reason == lib.KVM_EXIT_FAIL_ENTRY:
            why = lib.vcpu_entry_failure(run)
            return VcpuExit("failed", f"the processor refused to enter the guest: {why:#x}")
        return VcpuExit("failed", f"KVM_RUN: unknown exit {reason}")


def _system_event(event: int) -> VcpuExit:
    if event == lib.KVM_SYSTEM_EVENT_SHUTDOWN:
        return VcpuExit("shutdown", "system event")
    if event == lib.KVM_SYSTEM_EVENT_RESET:
        return VcpuExit("reset", "system event")
    return VcpuExit("failed", f"system event {event}")


_installing: Final = threading.Lock()


def _kick_signal() -> int:
    """Install the signal that interrupts KVM_RUN, if it is not yet, and give its number."""
    with _installing:
        number = lib.kick_install()
    if number < 0:
        raise OSError(-number, "no real-time signal is free to interrupt a vCPU with")
    return number
