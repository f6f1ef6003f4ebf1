"""The one interface between the library and a hypervisor engine.

An :class:`Engine` tells whether it can run here and opens a :class:`Machine`: one running
virtual machine, alive for the length of an ``async with`` block. Nothing above this module
knows which engine it talks to, and an engine knows nothing of images, execs or the agent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Literal

import attrs
import trio

from ..devices.virtio import VirtioDevice
from ..snapshots.memory import PagePatch
from ..snapshots.pages import Run
from ..vsock.stream import VsockStream

#: Words on the kernel's command line that every engine adds.
COMMON_WORDS: Final = (
    "console=ttyS0",
    "reboot=t",  # a triple fault: every engine leaves at once
    "panic=-1",
    "quiet",
    "8250.nr_uarts=1",
    "random.trust_cpu=on",
    "cryptomgr.notests",
    # The jitter generator times itself for a tenth of a second, and only FIPS mode needs it: the
    # kernel's own generator is seeded by the processor and the virtio device.
    "initcall_blacklist=jent_mod_init",
)

ExitReason = Literal["shutdown", "reset", "killed", "failed", "stopped"]


@attrs.frozen(kw_only=True)
class Disk:
    """A virtio-blk disk; guests see disks in the order given (``/dev/vda`` first)."""

    path: Path
    readonly: bool = True


@attrs.frozen(kw_only=True)
class Restore:
    """A state to go on from.

    :ivar identity: what :meth:`Machine.capture` may name as ``since``.
    :ivar state: the file of the engine's device state.
    :ivar memory: a file of the whole guest memory, which stays as it is: the machine maps it
        copy-on-write.
    :ivar patches: pages that replace those of ``memory``, the oldest patch first.
    """

    identity: str
    state: Path
    memory: Path
    patches: tuple[PagePatch, ...] = ()


@attrs.frozen(kw_only=True)
class Captured:
    """What :meth:`Machine.capture` wrote.

    :ivar runs: (first page, number of pages) of the pages that were captured, ascending.
    :ivar complete: the rest of the memory is zero; otherwise it is as it was in ``since``.
    :ivar standstill: how long the guest stood still, in seconds.
    """

    runs: tuple[Run, ...]
    complete: bool
    standstill: float


@attrs.frozen(kw_only=True)
class MachineSpec:
    """The hardware of one machine, and what it boots or goes on from.

    ``cmdline`` is what the caller needs on the kernel's command line; an engine adds its own
    words (console, timer calibration). A restored machine has its kernel in its memory; the
    hardware must be that of the captured one.

    :ivar devices: make further virtio devices, at most 8; an engine may have no place for any.
    """

    kernel: Path | None = None
    initramfs: Path | None = None
    cmdline: str = ""
    memory_mib: int = 256
    vcpus: int = 1
    disks: tuple[Disk, ...] = ()
    devices: tuple[Callable[[], VirtioDevice], ...] = ()
    restore: Restore | None = None


@attrs.frozen(kw_only=True)
class MachineExit:
    """How a machine ended; ``detail`` is for people."""

    reason: ExitReason
    detail: str = ""


@attrs.frozen(kw_only=True)
class EngineReport:
    """What an engine's probe found: ``detail`` says what, or why not; ``remedy`` how to get it."""

    name: str
    available: bool
    detail: str
    remedy: str | None = None


class Console(ABC):
    """The guest's console: a bounded ring of bytes with any number of readers."""

    @abstractmethod
    def tail(self, max_bytes: int = 4096) -> bytes:
        """Give the newest bytes, at most ``max_bytes``."""

    def text_tail(self, max_bytes: int = 4096) -> str:
        """Give the newest bytes as text; what is no UTF-8 becomes U+FFFD."""
        return self.tail(max_bytes).decode("utf-8", "replace")

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over chunks: first what the ring still holds, then as it comes, to its end.

        A reader slower than the ring is wide loses the oldest bytes, never blocks the guest.
        """


class Machine(ABC):
    """One running virtual machine. Only :meth:`Engine.open` makes one."""

    #: The engine's name, such as ``"qemu"``.
    engine: str
    console: Console

    @abstractmethod
    async def dial(self, port: int, opening: bytes = b"") -> VsockStream:
        """Open a stream to vsock ``port`` in the guest.

        With an ``opening``, the first bytes to send, it does not wait for the guest's answer; a
        refusal breaks the stream then.

        :raises ConnectionRefusedError: nothing listens there.
        :raises VmExited: the machine is gone.
        """

    @abstractmethod
    def listen(self, port: int) -> trio.abc.Listener[VsockStream]:
        """Accept streams that the guest opens to vsock ``port`` of the host, from this call on.

        The backlog is bounded; connections beyond it are refused. ``accept`` raises
        :exc:`VmExited` when the machine is gone. :raises OSError: (``EADDRINUSE``) port taken.
        """

    @abstractmethod
    async def pause(self) -> None:
        """Stop the vCPUs; returns when they stand still. Idempotent."""

    @abstractmethod
    async def resume(self) -> None:
        """Let the vCPUs run again, or a restored machine's for the first time. Idempotent.

        :raises SnapshotInvalid: the engine cannot load the state to go on from.
        """

    @abstractmethod
    async def capture(
        self,
        state: Path,
        memory: Path,
        *,
        at_rest: AbstractAsyncContextManager[None],
        since: str | None = None,
    ) -> Captured:
        """Save the machine as it is at one moment; it goes on, its streams included.

        ``state`` becomes the engine's device state and ``memory`` a sparse file of the size of
        the guest's memory; both must not exist. A cancelled or failed call leaves files that
        are good for nothing, and a machine that runs as before. One call at a time.

        :param at_rest: a block that the moment lies in; entered as late as can be.
        :param since: write only what may have changed since this restore, if the machine knows.
        :raises CaptureFailed: the guest did not come to rest, or the engine refused.
        :raises OSError: a file cannot be written.
        """

    @abstractmethod
    async def wait_exit(self) -> MachineExit:
        """Wait until the machine has ended by itself or by :meth:`kill`; any number of waiters."""

    @abstractmethod
    def kill(self, reason: ExitReason = "stopped") -> None:
        """End the machine at once. Plain and idempotent; :meth:`wait_exit` tells when it is, and
        with this reason unless it had another by itself.
        """


class Engine(ABC):
    """A way to run machines."""

    name: str

    @abstractmethod
    async def probe(self) -> EngineReport:
        """Find out whether this engine can run a guest here, cheaply and without side effects."""

    @abstractmethod
    async def host_facts(self) -> Mapping[str, str]:
        """What a machine's saved state depends on, here: it goes on only where all are equal."""

    @abstractmethod
    def open(self, spec: MachineSpec) -> AbstractAsyncContextManager[Machine]:
        """Start a machine: entered when its vCPUs run; left when nothing of it remains.

        A restored machine stands still until :meth:`Machine.resume`, so that whatever its guest
        does first finds a listener.

        Leaving the block by any path, a cancellation included, kills the machine and waits,
        shielded and bounded, until its process, files and descriptors are gone. Exceptions of
        the body come out as themselves. The machine's own end does not end the block: whoever
        opened it watches :meth:`Machine.wait_exit`; streams break with ``BrokenResourceError``.

        :raises AssetNotFound: the engine's program is not installed.
        :raises NotSupported: this engine cannot have devices that are made here.
        :raises VmExited: the engine refused to start the machine.
        """
