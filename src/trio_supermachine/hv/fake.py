"""A machine without a hypervisor, for tests of the layers above engines.

To everything above :mod:`~trio_supermachine.hv.base`, a :class:`FakeEngine` is an engine and a
:class:`FakeMachine` is a machine. Nothing executes in it: the test plays the guest, by an async
function that gets a :class:`FakeGuest` or by calls on :attr:`FakeMachine.guest`.

Example::

    async def greet(guest: FakeGuest) -> None:
        async with await guest.dial(1029) as stream:
            await stream.send_all(b"hello")
        await guest.write_console(b"power down\\n")
        guest.end("shutdown")

    async with FakeEngine(greet).open(MachineSpec()) as machine:
        stream = await machine.listen(1029).accept()
        assert await stream.receive_some() == b"hello"
        assert (await machine.wait_exit()).reason == "shutdown"

How it works:

- *Streams.* The host's muxer and the guest's are the real ones, back to back on a
  :class:`~trio_supermachine.vsock.memory.Line`. With ``raw_channel=True`` the host's muxer runs on
  a socket instead, as on QEMU, and the guest is whatever has the other end
  (:attr:`FakeGuest.channel`): an agent process, or a test that breaks the protocol.
- *Standing still.* A pause, a capture and :meth:`FakeGuest.hang` hold the line, so that streams
  only wait; calls of the guest wait, too. Other work of its function goes on, and so does whatever
  is behind a raw channel.
- *Memory* is the pages that the guest has written. A capture writes these alone, and a restored
  machine reads them back. :attr:`FakeGuest.state` stands for the device state.
- *Time.* There is no thread, and without a raw channel no descriptor, so that no wait takes time
  under :class:`trio.testing.MockClock` with ``autojump_threshold=0``.
- *The end* is one step, whatever causes it: the exit is told, the console ends, streams break,
  and the guest's function is cancelled. The first cause counts.

Kernel, initramfs and disks must exist; nothing reads them.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._util.nursery import open_flat_nursery
from ..errors import CaptureFailed, NotSupported, SnapshotInvalid, VmExited
from ..snapshots.memory import MemoryImage
from ..snapshots.pages import PAGE, union
from ..vsock.carrier import SocketCarrier
from ..vsock.memory import Line
from ..vsock.packet import GUEST_CID, HOST_CID, VsockProtocolError
from ..vsock.stream import VsockListener, VsockMux, VsockStream
from .base import Captured, Engine, EngineReport, ExitReason, Machine, MachineExit, MachineSpec
from .console import ConsoleRing
from .copying import new_file

#: Seconds that a guest may take to come to rest for a capture, as on QEMU.
_REST: Final = 5.0


@final
class FakeGuest:
    """Guest of one :class:`FakeMachine`, which a test plays.

    :ivar spec: the hardware that the guest finds.
    :ivar state: bytes that stand for the device state; restored copies get them.
    """

    def __init__(self, machine: FakeMachine, mux: VsockMux, channel: socket.socket | None) -> None:
        self.spec: MachineSpec = machine.spec
        self.state = b""
        self._machine = machine
        self._mux = mux
        self._channel = channel

    @property
    def restored(self) -> bool:
        """Whether the machine goes on from a capture; otherwise it has booted."""
        return self.spec.restore is not None

    @property
    def channel(self) -> socket.socket:
        """The guest's end of a raw channel, a socket for vsock packets."""
        assert self._channel is not None, "the machine has no raw channel"
        return self._channel

    async def wait_running(self) -> None:
        """Wait until the machine's processors run and the guest does not hang.

        :raises trio.BrokenResourceError: the machine has ended.
        """
        await trio.lowlevel.checkpoint()
        machine = self._machine
        while machine.paused or machine.hung:
            machine.check_guest()
            await machine.news.park()
        machine.check_guest()

    async def dial(self, port: int, opening: bytes = b"") -> VsockStream:
        """Open a stream to a listener of the host, in the manner of :meth:`.Machine.dial`.

        :raises ConnectionRefusedError: nothing listens there.
        :raises trio.BrokenResourceError: the machine has ended.
        """
        await self.wait_running()
        return await self._mux.dial(port, opening)

    def listen(self, port: int) -> VsockListener:
        """Accept streams that the host dials to ``port``, from this call on.

        :raises OSError: (``EADDRINUSE``) the port has a listener.
        """
        return self._mux.listen(port)

    async def write_console(self, data: bytes) -> None:
        """Print ``data`` on the console.

        :raises trio.BrokenResourceError: the machine has ended.
        """
        await self.wait_running()
        self._machine.console.feed(data)

    def read_page(self, number: int) -> bytes:
        """Return a page of guest memory, 4096 bytes."""
        return self._machine.pages.get(self._checked(number), bytes(PAGE))

    def write_page(self, number: int, data: bytes) -> None:
        """Replace a page of guest memory by ``data``, zeros behind it up to 4096 bytes."""
        if len(data) > PAGE:
            raise ValueError(f"{len(data)} bytes are more than a page")
        self._machine.pages[self._checked(number)] = data.ljust(PAGE, b"\0")
        self._machine.changed.add(number)

    def _checked(self, number: int) -> int:
        if not 0 <= number < self._machine.page_count:
            raise IndexError(f"page {number} of a memory of {self._machine.page_count}")
        return number

    def hang(self) -> None:
        """Do nothing more, while the processors run: streams wait, and captures fail."""
        if not self._machine.hung:
            self._machine.hung = True
            self._machine.line.hold()

    def recover(self) -> None:
        """Undo :meth:`hang`."""
        if self._machine.hung:
            self._machine.hung = False
            self._machine.line.release()
            self._machine.news.unpark_all()

    def end(self, reason: ExitReason = "shutdown", detail: str = "") -> None:
        """End the machine at once, as a guest that powers off does, or an engine that fails."""
        self._machine.end(MachineExit(reason=reason, detail=detail))


#: A guest's work, from its first instruction on. When the function returns, the guest idles; an
#: error that it raises comes out of the machine's block.
GuestFunction = Callable[[FakeGuest], Awaitable[object]]


@final
class FakeMachine(Machine):
    """A machine whose guest a test plays. Only :meth:`FakeEngine.open` makes one.

    :ivar guest: plays the guest from outside its function.
    :ivar paused: the processors stand still; so do those of a restored machine at first.
    """

    def __init__(self, engine: str, spec: MachineSpec, channel: ExitStack | None) -> None:
        self.engine = engine
        self.console: ConsoleRing = ConsoleRing()
        self.spec = spec
        self.paused: bool = False
        self.hung = False
        self.pages: dict[int, bytes] = {}
        self.changed: set[int] = set()
        self.line: Line = Line()
        self.news: trio.lowlevel.ParkingLot = trio.lowlevel.ParkingLot()
        self._exit: MachineExit | None = None
        self._exited = trio.Event()
        self._started = trio.Event()
        self._scope = trio.CancelScope(shield=True)
        theirs: socket.socket | None = None
        if channel is None:
            self._mux = VsockMux(self.line.ends[0])
        else:
            ours, theirs = socket.socketpair()
            channel.callback(theirs.close)
            self._mux = VsockMux(SocketCarrier(ours))
        guest_mux = VsockMux(self.line.ends[1], local_cid=GUEST_CID, peer_cid=HOST_CID)
        self.guest: FakeGuest = FakeGuest(self, guest_mux, theirs)
        if spec.restore is None:
            self._started.set()
        else:
            self._stop()

    @property
    def page_count(self) -> int:
        """The pages of guest memory."""
        return (self.spec.memory_mib << 20) // PAGE

    async def dial(self, port: int, opening: bytes = b"") -> VsockStream:
        return await self._mux.dial(port, opening)

    def listen(self, port: int) -> trio.abc.Listener[VsockStream]:
        return self._mux.listen(port)

    async def pause(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check_alive()
        self._stop()

    async def resume(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check_alive()
        if not self._started.is_set():
            self._load()
            self._started.set()
        if self.paused:
            self.paused = False
            self.line.release()
            self.news.unpark_all()

    def _stop(self) -> None:
        if not self.paused:
            self.paused = True
            self.line.hold()

    async def capture(
        self,
        state: Path,
        memory: Path,
        *,
        at_rest: AbstractAsyncContextManager[None],
        since: str | None = None,
    ) -> Captured:
        self._check_alive()
        restore = self.spec.restore
        whole = since is None or restore is None or since != restore.identity
        with new_file(state) as state_fd, new_file(memory) as memory_fd:
            os.ftruncate(memory_fd, self.page_count * PAGE)
            await trio.lowlevel.checkpoint()
            async with at_rest, self._quiet():
                began = trio.current_time()
                await trio.lowlevel.checkpoint()
                self._check_alive()
                pages = sorted(self.pages if whole else self.changed)
                for number in pages:
                    os.pwrite(memory_fd, self.pages[number], number * PAGE)
                os.write(state_fd, self._saved())
                standstill = trio.current_time() - began
        runs = [(0, self.page_count)] if whole else union((number, 1) for number in pages)
        return Captured(runs=tuple(runs), complete=whole, standstill=standstill)

    @asynccontextmanager
    async def _quiet(self) -> AsyncIterator[None]:
        """Hold the line for a block, once the guest has come to rest."""
        async with AsyncExitStack() as stack:
            with trio.move_on_after(_REST) as scope:
                while self.hung and self._exit is None:
                    await self.news.park()
                self._check_alive()
                await stack.enter_async_context(self._mux.quiet())
            if scope.cancelled_caught:
                raise CaptureFailed(f"the guest did not come to rest within {_REST:g} s")
            yield

    def _saved(self) -> bytes:
        hardware = {"memory_mib": self.spec.memory_mib, "vcpus": self.spec.vcpus}
        return json.dumps({"fake": hardware, "state": self.guest.state.hex()}).encode()

    def _load(self) -> None:
        restore = self.spec.restore
        assert restore is not None
        try:
            saved = json.loads(restore.state.read_bytes())
            hardware, self.guest.state = saved["fake"], bytes.fromhex(saved["state"])
            if hardware != {"memory_mib": self.spec.memory_mib, "vcpus": self.spec.vcpus}:
                raise ValueError(f"it is of a machine with {hardware}")
        except (ValueError, KeyError, TypeError) as exc:
            reason = f"the fake engine cannot load it: {exc!r}; make the snapshot again"
            raise SnapshotInvalid(str(restore.state), reason) from exc
        image = MemoryImage(restore.memory, self.page_count * PAGE, restore.patches)
        with image.reader() as reader:
            for first, count in reader.stored():
                for number in range(first, first + count):
                    self.pages[number] = reader.read(number, 1)

    async def wait_exit(self) -> MachineExit:
        await self._exited.wait()
        assert self._exit is not None
        return self._exit

    def kill(self, reason: ExitReason = "stopped") -> None:
        self.end(MachineExit(reason=reason))

    def _check_alive(self) -> None:
        if self._exit is not None:
            raise self._vm_exited()

    def _vm_exited(self) -> VmExited:
        assert self._exit is not None
        return VmExited(self._exit.reason, self._exit.detail, console=self.console.text_tail())

    # For the guest.

    def check_guest(self) -> None:
        """Raise :exc:`trio.BrokenResourceError` if the machine has ended."""
        if self._exit is not None:
            raise trio.BrokenResourceError("the machine has ended")

    def end(self, exit_: MachineExit) -> None:
        """End the machine, if it has not ended yet."""
        if self._exit is not None:
            return
        self._exit = attrs.evolve(exit_, detail=exit_.detail or self.console.last_words())
        self._scope.cancel()  # first, so that the guest's function does not hear the rest
        self.console.end()
        self._mux.close(self._vm_exited)
        self.guest._mux.close()
        self._exited.set()
        self.news.unpark_all()

    # The machine's life, in a task that the engine's ``open`` owns.

    async def run(self, function: GuestFunction | None) -> None:
        """Move packets and play the guest until the machine ends.

        Shielded: while the owner is being cancelled, calls to the guest that clean up still go
        through; the owner ends this by killing the machine.
        """
        try:
            with self._scope:
                async with open_flat_nursery() as nursery:
                    nursery.start_soon(self._serve_channel)
                    nursery.start_soon(self.guest._mux.run)
                    if function is not None:
                        nursery.start_soon(self._play, function)
        finally:
            self.end(MachineExit(reason="failed", detail="the guest's function failed"))

    async def _serve_channel(self) -> None:
        try:
            await self._mux.run()
        except VsockProtocolError as exc:
            detail = f"the guest broke the vsock protocol: {exc}"
            self.end(MachineExit(reason="failed", detail=detail))
        else:
            self.end(MachineExit(reason="failed", detail="the guest's channel has ended"))

    async def _play(self, function: GuestFunction) -> None:
        await self._started.wait()
        try:
            await function(self.guest)
        except (trio.BrokenResourceError, BaseExceptionGroup) as exc:
            # The machine's end may break its streams before it is cancelled: no error of the test.
            if self._exit is None or not _is_broken(exc):
                raise


def _is_broken(exc: BaseException) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        return exc.split((trio.BrokenResourceError, trio.Cancelled))[1] is None
    return isinstance(exc, trio.BrokenResourceError)


@final
class FakeEngine(Engine):
    """Engine of machines whose guests a test plays.

    :param guest: plays the guest of each machine, from its first instruction on: a booted
        machine's at once, a restored one's at the first resume.
    :param name: the name of the engine, which snapshots are tied to.
    :param facts: the facts about this host, which snapshots depend on.
    :param report: what the probe says; by default, that the engine is available.
    :param before_open: called with the specification of each machine before it is made. It may
        wait, as a slow host does, or raise, as an engine that refuses.
    :param raw_channel: carry the host's vsock packets on a socket, :attr:`FakeGuest.channel`.
    :ivar machines: the machines that are open now, the oldest first.
    """

    def __init__(
        self,
        guest: GuestFunction | None = None,
        *,
        name: str = "fake",
        facts: Mapping[str, str] | None = None,
        report: EngineReport | None = None,
        before_open: Callable[[MachineSpec], Awaitable[object]] | None = None,
        raw_channel: bool = False,
    ) -> None:
        self.name = name
        self.machines: list[FakeMachine] = []
        self._guest = guest
        self._facts = {"machine": "1"} if facts is None else dict(facts)
        self._report = report or EngineReport(
            name=name, available=True, detail="a machine for tests, without a hypervisor"
        )
        self._before_open = before_open
        self._raw_channel = raw_channel

    async def probe(self) -> EngineReport:
        await trio.lowlevel.checkpoint()
        return self._report

    async def host_facts(self) -> Mapping[str, str]:
        await trio.lowlevel.checkpoint()
        return self._facts

    def open(self, spec: MachineSpec) -> AbstractAsyncContextManager[FakeMachine]:
        return self._open(spec)

    @asynccontextmanager
    async def _open(self, spec: MachineSpec) -> AsyncIterator[FakeMachine]:
        if spec.devices:
            raise NotSupported("devices", "a fake machine has no device that a driver could find")
        await trio.lowlevel.checkpoint()
        if self._before_open is not None:
            await self._before_open(spec)
        for file in _files(spec):
            os.stat(file)
        with ExitStack() as channel:
            machine = FakeMachine(self.name, spec, channel if self._raw_channel else None)
            self.machines.append(machine)
            try:
                async with open_flat_nursery() as nursery:
                    nursery.start_soon(machine.run, self._guest)
                    try:
                        yield machine
                    finally:
                        machine.kill()
            finally:
                self.machines.remove(machine)


def _files(spec: MachineSpec) -> list[Path]:
    files = [spec.kernel, spec.initramfs, *(disk.path for disk in spec.disks)]
    if spec.restore is not None:
        files += [spec.restore.state, spec.restore.memory]
        files += [patch.file for patch in spec.restore.patches]
    return [file for file in files if file is not None]
