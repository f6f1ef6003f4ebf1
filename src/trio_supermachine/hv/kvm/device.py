"""A virtio device of a running machine: its queues' descriptors, and the task that serves it.

Theory of operation. Two threads meet here. The driver reads and writes registers in a vCPU's
thread, with the machine's lock held; the device's ``run`` is a task in the Trio thread. Most
notifications take neither lock nor exit: the kernel signals a descriptor when the driver kicks a
queue, and raises an interrupt when one is written to.

:meth:`MachineDevice.serve` is a loop over one decision: the device runs if its driver wants it
    (``function.running``) and nobody holds it. Whatever changes the answer calls ``_look``, in the
    Trio thread: it wakes the loop if it waits, and cancels ``run`` if that is not wanted any more.
    At each turn a reset that the driver waits for is finished first, as ``run`` has ended then.

:meth:`MachineDevice.hold` returns when ``run`` has ended, so that nothing touches guest memory. A
device that is held and released in the same moment may not have stopped at all.

*Lost wake-ups.* A queue's kick may have come before its descriptor is waited for, or been lost by a
snapshot. So a queue's first ``wait`` returns at once, and later ones look at the ring behind asking
for kicks. Likewise each start interrupts, for the last ``run`` may have ended between a push and
its interrupt.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, suppress
from typing import Final, final

import trio

from ..._util.trace import trace
from ...devices.memory import GuestMemory, GuestMemoryError
from ...devices.virtio import Queue, VirtioDevice
from ...devices.virtio_pci import NOTIFY_MULTIPLIER, VirtioPciFunction
from ...devices.virtqueue import Chain, QueueFault, Virtqueue
from .api import KvmVm
from .routes import InterruptRoutes

_EVENTFD: Final = os.EFD_NONBLOCK | os.EFD_CLOEXEC


@final
class MachineDevice:
    """One virtio device as a PCI function. Its PCI function calls it as :class:`.TransportEvents`.

    :param lock: the machine's lock, for registers.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        vm: KvmVm,
        routes: InterruptRoutes,
        lock: threading.Lock,
    ) -> None:
        self.function: VirtioPciFunction = VirtioPciFunction(device, memory, self)
        self._device = device
        self._vm = vm
        self._routes = routes
        self._lock = lock
        self._doorbells: int | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._held = True
        self._news = trio.Event()
        self._at_rest = True
        self._waiters = trio.lowlevel.ParkingLot()
        self._scope: trio.CancelScope | None = None
        with ExitStack() as files:
            self._kicks = [self._eventfd(files) for _ in device.queue_sizes]
            self._interrupts = [self._eventfd(files) for _ in range(self.function.msix.vectors)]
            self._first_gsi = routes.allocate(len(self._interrupts))
            self._files = files.pop_all()

    @staticmethod
    def _eventfd(files: ExitStack) -> int:
        fd = os.eventfd(0, _EVENTFD)
        files.callback(os.close, fd)
        return fd

    def close(self) -> None:
        """Close the descriptors and let go of guest memory. :meth:`serve` has ended."""
        self.function.virtqueues = ()
        self._files.close()

    # --- calls of the PCI function, with the lock held ---

    def driver_ok(self) -> None:
        self._tell()

    def reset_requested(self) -> None:
        self._tell()

    def kick(self, queue: int) -> None:
        os.eventfd_write(self._kicks[queue], 1)

    def signal(self, vector: int) -> None:
        os.eventfd_write(self._interrupts[vector], 1)

    def vectors_changed(self, vector: int) -> None:
        message = self.function.message(vector)
        if message is not None:
            self._routes.route(self._first_gsi + vector, self._interrupts[vector], message)

    def doorbells_moved(self, address: int | None) -> None:
        for at, deassign in ((self._doorbells, True), (address, False)):
            if at is not None:
                for queue, eventfd in enumerate(self._kicks):
                    doorbell = at + NOTIFY_MULTIPLIER * queue
                    self._vm.ioeventfd(eventfd, doorbell, length=2, deassign=deassign)
        self._doorbells = address

    def _tell(self) -> None:
        if self._token is not None:
            self._token.run_sync_soon(self._look)

    # --- in the Trio thread ---

    async def serve(self) -> None:
        """Run the device whenever its driver wants it and nobody holds it, until cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        try:
            while True:
                news = self._news
                with self._lock:
                    self.function.finish_reset()
                    due = self.function.running and not self._held
                if due:
                    self._at_rest = False
                    await self._run()
                else:
                    self._rest()
                    await news.wait()
        finally:
            self._rest()

    def _rest(self) -> None:
        self._at_rest = True
        self._waiters.unpark_all()

    async def hold(self) -> None:
        """Let the device stand still: it touches no guest memory until :meth:`release`.

        Return when it does, or has been released again.
        """
        self._held = True
        self._look()
        while self._held and not self._at_rest:
            await self._waiters.park()

    def release(self) -> None:
        """Let the device go on."""
        self._held = False
        self._waiters.unpark_all()
        self._look()

    def _look(self) -> None:
        self._news.set()
        self._news = trio.Event()
        if self._scope is not None:
            with self._lock:
                due = self.function.running and not self._held
            if not due:
                self._scope.cancel()

    async def _run(self) -> None:
        queues: list[Queue] = []
        for index, virtqueue in enumerate(self.function.virtqueues):
            if virtqueue is None:
                queues.append(_MissingQueue())
            else:
                queues.append(_LiveQueue(self, index, virtqueue))
        with trio.CancelScope() as self._scope:
            try:
                for queue in queues:
                    queue.interrupt()
                await self._device.run(queues)
            except* (QueueFault, GuestMemoryError) as faults:
                trace("kvm", "%s: %s", type(self._device).__name__, faults)
                with self._lock:
                    self.function.fail()
        self._scope = None


@final
class _LiveQueue:
    """A virtqueue with the descriptor that its driver kicks."""

    def __init__(self, device: MachineDevice, index: int, virtqueue: Virtqueue) -> None:
        self._device = device
        self._index = index
        self._virtqueue = virtqueue
        self._kick = device._kicks[index]
        self._fresh = True
        self.pop = virtqueue.pop
        self.push = virtqueue.push

    async def wait(self) -> None:
        virtqueue = self._virtqueue
        if self._fresh or virtqueue.enable_kicks():
            self._fresh = False
            await trio.lowlevel.checkpoint()
            return
        await trio.lowlevel.wait_readable(self._kick)
        with suppress(BlockingIOError):
            os.eventfd_read(self._kick)
        virtqueue.disable_kicks()

    def interrupt(self) -> None:
        if self._virtqueue.should_interrupt():
            device = self._device
            with device._lock:
                device.function.interrupt_queue(self._index)


@final
class _MissingQueue:
    """A queue that the driver has not enabled."""

    async def wait(self) -> None:
        await trio.sleep_forever()

    def pop(self) -> Chain | None:
        return None

    def push(self, chain: Chain, written: int = 0) -> None:
        raise AssertionError("nothing was popped")

    def interrupt(self) -> None:
        pass
