"""The one interface between the library and a hypervisor engine.

An :class:`Engine` tells whether it can run here and opens a :class:`Machine`: one running
virtual machine, alive for the length of an ``async with`` block. Nothing above this module
knows which engine it talks to, and an engine knows nothing of images, execs or the agent.

The contract of every engine is a suite of tests, ``MachineContract`` in
``tests/pure/test_fake_machine.py``, which runs on :mod:`.fake` and on real ones. To add an engine:
implement the two classes, pass the suite, and name the engine in :mod:`.select`.
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
    """A virtio-blk disk. Guests see disks in the order given, ``/dev/vda`` first."""

    path: Path
    readonly: bool = True


@attrs.frozen(kw_only=True)
class Restore:
    """A captured state that a machine goes on from.

    :ivar identity: names it as ``since`` in :meth:`Machine.capture`.
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
    """Result of :meth:`Machine.capture`.

    :ivar runs: the pages that were captured, ascending: (first page, number of pages).
    :ivar complete: whether the rest of the memory is zero; otherwise it is as it was in ``since``.
    :ivar standstill: seconds that the guest stood still.
    """

    runs: tuple[Run, ...]
    complete: bool
    standstill: float


@attrs.frozen(kw_only=True)
class MachineSpec:
    """The hardware of one machine, and the kernel that it boots or the state it goes on from.

    :ivar kernel: the kernel and ``initramfs`` to boot. A restored machine has its own in memory.
    :ivar cmdline: words for the kernel's command line, beside those that the engine adds.
    :ivar memory_mib: the memory in MiB, and ``vcpus`` the processors; those of a restored machine
        must be the captured one's, and so must its disks.
    :ivar devices: make further virtio devices, at most 8; an engine may have no place for any.
    :ivar restore: the state to go on from; ``None`` for a boot.
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
    """End of a machine; ``detail`` is for people."""

    reason: ExitReason
    detail: str = ""


@attrs.frozen(kw_only=True)
class EngineReport:
    """Result of an engine's probe, for people.

    :ivar detail: what was found, or why the engine is not available.
    :ivar remedy: how to make it available.
    """

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
        """Iterate over chunks: first those that the ring holds, then new ones, to the end.

        A reader that falls behind by more than the ring holds loses the oldest bytes; it never
        blocks the guest.
        """


class Machine(ABC):
    """One running virtual machine. Only :meth:`Engine.open` makes one."""

    #: The engine's name, such as ``"qemu"``.
    engine: str
    console: Console

    @abstractmethod
    async def dial(self, port: int, opening: bytes = b"") -> VsockStream:
        """Open a stream to vsock ``port`` in the guest.

        :param opening: the first bytes to send. With any, the call does not wait for the guest's
            answer, and a refusal breaks the stream.

        :raises ConnectionRefusedError: nothing listens there.
        :raises VmExited: the machine is gone.
        """

    @abstractmethod
    def listen(self, port: int) -> trio.abc.Listener[VsockStream]:
        """Accept streams that the guest opens to vsock ``port`` of the host, from this call on.

        The backlog is bounded; connections beyond it are refused. ``accept`` raises
        :exc:`VmExited` when the machine is gone.

        :raises OSError: (``EADDRINUSE``) the port has a listener.
        """

    @abstractmethod
    async def pause(self) -> None:
        """Stop the vCPUs and wait until they stand still. Idempotent.

        :raises VmExited: the machine is gone.
        """

    @abstractmethod
    async def resume(self) -> None:
        """Let the vCPUs run again, or a restored machine's for the first time. Idempotent.

        :raises SnapshotInvalid: the engine cannot load the state to go on from.
        :raises VmExited: the machine is gone.
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
        """Save the machine as it is at one moment. It goes on afterwards, its streams included.

        A cancelled or failed call leaves a machine that runs as before, and files that are good for
        nothing. One call at a time.

        :param state: the new file for the engine's device state.
        :param memory: the new, sparse file for memory, of the size of the guest's memory.
        :param at_rest: a block around the moment; entered as late as can be.
        :param since: identity of a restore. If the machine began with it, write only pages that may
            have changed since.
        :raises CaptureFailed: the guest did not come to rest, or the engine refused.
        :raises OSError: a file cannot be written.
        """

    @abstractmethod
    async def wait_exit(self) -> MachineExit:
        """Wait until the machine has ended by itself or by :meth:`kill`. Any number may wait."""

    @abstractmethod
    def kill(self, reason: ExitReason = "stopped") -> None:
        """Begin to end the machine. Plain and idempotent.

        :meth:`wait_exit` returns when it has ended, and gives this reason unless the machine had
        ended for another.
        """


class Engine(ABC):
    """One way to run machines."""

    name: str

    @abstractmethod
    async def probe(self) -> EngineReport:
        """Find out whether this engine can run a guest here, cheaply and without side effects."""

    @abstractmethod
    async def host_facts(self) -> Mapping[str, str]:
        """Give what the saved state of a machine depends on, here.

        A state goes on only on hosts where all of these are equal.
        """

    @abstractmethod
    def open(self, spec: MachineSpec) -> AbstractAsyncContextManager[Machine]:
        """Run a machine for the length of a block.

        A booted machine runs when the block is entered. A restored one stands still until
        :meth:`Machine.resume`, so that the guest's first dial finds a listener.

        Leaving the block by any path, a cancellation included, kills the machine and waits,
        shielded and bounded, until its process, files and descriptors are gone. Exceptions of
        the body come out as themselves. The machine's own end does not end the block: whoever
        opened it watches :meth:`Machine.wait_exit`. Streams break with
        :exc:`trio.BrokenResourceError`.

        :raises AssetNotFound: the engine's program is not installed.
        :raises FileNotFoundError: a file of ``spec`` is missing. (QEMU says so of a kernel or an
            initramfs as `VmExited`.)
        :raises NotSupported: the engine has no place for ``spec.devices``.
        :raises VmExited: the engine refused to start the machine.
        """
