"""A running virtual machine as users hold it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, Literal

import attrs
import trio

from ._nursery import open_flat_nursery
from ._validators import StrPath
from .agent import wire
from .agent.client import AgentClient, exited
from .agent.wire import ExecFlags, ExecRequest, Exit
from .capture import capture
from .config import VmConfig
from .errors import ConfigError, ExecEof, NotSupported, VmExited
from .exec import ExecChild, check_winsize, open_exec
from .exec_builder import ExecBuilder, env_entry, user_field
from .guest_files import GuestFiles, guest_path
from .guest_network import GuestNetwork
from .hv.base import Console, Machine
from .launch import Plan, launched, plan
from .net.network import VmNetwork
from .run_process import (
    Command,
    OutputTarget,
    StrOrBytes,
    StrOrBytesPath,
    command_argv,
    run_process,
)
from .snapshots import Snapshot, open_snapshot
from .trace import trace

if TYPE_CHECKING:
    from .images.image import Image

_POWER_OFF: Final = 2.0  # seconds for the guest kernel to power off, beyond the grace


class Vm(GuestFiles, GuestNetwork):
    """A running virtual machine. Only :meth:`Vm.start` makes one.

    Every call that needs the guest waits while the VM is paused, raises :exc:`VmExited` once it
    has ended, and is cancellable.

    :ivar image: the :class:`Image` it runs.
    :ivar config: the :class:`VmConfig` it was started with.
    :ivar engine: the name of the engine that runs it.
    :ivar started_by: ``"boot"`` or ``"restore"``.
    :ivar console: the guest's console, kernel and workload alike: ``async for chunk in
        vm.console`` gives bytes from the boot on, to any number of readers, out of a bounded ring.
    """

    def __init__(
        self,
        image: Image,
        config: VmConfig,
        plan: Plan,
        client: AgentClient,
        network: VmNetwork,
    ) -> None:
        self.image = image
        self.config = config
        self.engine: str = client.machine.engine
        self.started_by: Literal["boot", "restore"] = plan.started_by
        self._plan = plan
        self.console: Console = client.machine.console
        self._client = client
        self._network = network
        self._machine: Machine = client.machine
        self._capturing = trio.Lock()
        self._body = trio.CancelScope()
        self._stopping = False
        self._exited: VmExited | None = None

    def __repr__(self) -> str:
        state = "running" if self._exited is None else f"exited ({self._exited.reason})"
        return f"<Vm {self.image.reference!r} on {self.engine}: {state}>"

    @staticmethod
    def start(
        image: Image, config: VmConfig | None = None, *, workload: bool = True
    ) -> AbstractAsyncContextManager[Vm]:
        """Start a VM: an async context manager, entered when the guest's agent has answered.

        A VM of an image with a snapshot is restored from it, unless ``config`` needs other
        hardware than the snapshot has: then the image boots. The image's own entrypoint and
        command run as the workload unless ``workload`` is false. Leaving the block, by any path,
        ends the VM at once and waits until nothing of it is left on the host. A VM that ends by
        itself cancels the body, and the block raises :exc:`VmExited`.

        :raises NotSupported: the configuration asks for what this version does not have.
        :raises EngineUnavailable: no engine can run a guest here.
        :raises AssetNotFound: a kernel or a tool is missing; the message says how to get it.
        :raises StartTimeout: the guest did not answer within ``config.start_timeout`` seconds.
        :raises RestoreTimeout: a restored one did not within ``config.restore_timeout`` seconds.
        :raises SnapshotInvalid: the snapshot is damaged, or of another engine or host.
        :raises AdmissionRefused: its memory can never be admitted (``memory_admission``).
        :raises VmExited: the guest ended before it answered.
        """
        return _start(image, config or VmConfig(), workload)

    # Programs

    def exec(
        self,
        argv: Sequence[StrOrBytesPath],
        *,
        env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
        cwd: StrOrBytesPath | None = None,
        user: str | int | None = None,
        tty: bool = False,
        winsize: tuple[int, int] | None = None,
        stdin: bool = True,
    ) -> AbstractAsyncContextManager[ExecChild]:
        """Run a program: an async context manager giving an :class:`ExecChild`.

        Leaving the block normally closes its stdin, discards unread output and waits for its
        end. Leaving it by an exception or a cancellation kills its process group first.

        :param argv: the program and its arguments; looked up in ``PATH`` without a slash.
        :param env: its whole environment, as for :class:`subprocess.Popen`; ``None`` is the
            image's. (:meth:`ExecBuilder.env` adds to the image's.)
        :param cwd: its working directory, from the image's; ``None`` is the image's.
        :param user: name or id with an optional group (``"app"``, ``"1234:1234"``, ``1234``).
        :param tty: give it a terminal; then ``stderr`` is empty.
        :param winsize: columns and rows of the terminal.
        :param stdin: give it a pipe as its stdin, instead of ``/dev/null``.
        :raises ValueError: ``argv`` is empty, or something holds NUL.
        :raises OSError: it could not be started (:exc:`FileNotFoundError` and so on), on entry.
        """
        flags = ExecFlags.NONE
        if stdin:
            flags |= ExecFlags.STDIN
        if tty:
            flags |= ExecFlags.TTY
        columns, rows = winsize or (0, 0)
        if winsize is not None:
            check_winsize(columns, rows)
        return self._open(
            _request(command_argv(argv), flags, env, cwd, user, columns=columns, rows=rows)
        )

    def exec_builder(self) -> ExecBuilder:
        """An empty :class:`ExecBuilder`."""
        return ExecBuilder(self._open)

    async def run_process(
        self,
        command: Command,
        *,
        stdin: bytes | bytearray | memoryview | int = b"",
        capture_stdout: bool = False,
        capture_stderr: bool = False,
        check: bool = True,
        stdout: OutputTarget = None,
        stderr: OutputTarget = None,
        env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
        cwd: StrOrBytesPath | None = None,
        user: str | int | None = None,
        shell: bool = False,
        task_status: trio.TaskStatus[ExecChild] = trio.TASK_STATUS_IGNORED,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program to its end, as :func:`trio.run_process` does on the host.

        With ``await nursery.start(vm.run_process, ...)`` it hands out the :class:`ExecChild`, and
        ``subprocess.PIPE`` may be given. What is not captured goes to the host's own stdout and
        stderr, to an open host file given as ``stdout`` or ``stderr``, or nowhere
        (``subprocess.DEVNULL``).

        Cancelling it kills the process group in the guest, with SIGKILL, and waits, shielded and
        for 2 s at most, until that is confirmed.

        :param stdin: its input, ``subprocess.PIPE`` or ``subprocess.DEVNULL``.
        :param env: its whole environment; ``None`` is the image's.
        :param shell: ``command`` is a string for the guest's ``/bin/sh``.
        :raises subprocess.CalledProcessError: ``check`` is true and it did not return 0.
        :raises OSError: it could not be started.
        """

        def open_child(
            argv: list[StrOrBytes], flags: ExecFlags, empty_stdin: bool
        ) -> AbstractAsyncContextManager[ExecChild]:
            return self._open(_request(argv, flags, env, cwd, user, empty_stdin=empty_stdin))

        return await run_process(
            open_child,
            command,
            stdin=stdin,
            capture_stdout=capture_stdout,
            capture_stderr=capture_stderr,
            check=check,
            stdout=stdout,
            stderr=stderr,
            shell=shell,
            task_status=task_status,
        )

    def _open(self, request: ExecRequest) -> AbstractAsyncContextManager[ExecChild]:
        return open_exec(self._client, request)

    # The workload and the machine

    async def workload_signal(self, signum: int) -> None:
        """Send a signal to the image's workload.

        :raises ProcessLookupError: there is none, or it has ended.
        """
        await self._client.call(wire.workload_signal(signum))

    async def wait_workload(self) -> int:
        """Wait for the end of the image's workload; its return code, negative for a signal.

        127 and 126 say that it could not be started, as in a shell; the console says why.

        :raises ProcessLookupError: the image has none.
        """
        answer = await self._client.call(wire.frame(wire.FrameType.WORKLOAD_WAIT))
        return Exit.decode(answer.payload).returncode

    async def ping(self) -> None:
        """Return when the guest's agent has answered."""
        await self._client.call(wire.frame(wire.FrameType.PING))

    async def pause(self) -> None:
        """Stop the guest's CPUs. Idempotent. Calls to the guest wait until :meth:`resume`.

        The guest never hears of a call that begins after this and is cancelled before that. A
        capture that is under way is waited for: it has to let the guest's programs go on.
        """
        if self._client.holding:
            await trio.lowlevel.checkpoint()
            return
        async with self._capturing:
            await self._machine.pause()
            self._client.hold()

    async def resume(self) -> None:
        """Let the guest's CPUs run again, and set its clock. Idempotent."""
        await self._machine.resume()
        self._client.release()
        await self._client.call(wire.set_clock(time.time_ns()))

    # Snapshots

    async def snapshot(self, dest: StrPath) -> Image:
        """Write the VM as it is at this moment to the directory ``dest``; it goes on running.

        Captured are memory, devices, processes and what was written to the root file system. An
        exec that is open now goes on here, and is ended in the restored copies. The guest
        stands still while its memory is copied. Captures of one VM wait for each other.

        Cancelled or failed, it leaves nothing, and the VM runs on.

        :param dest: must not exist, or be an empty directory.
        :returns: an image that restores.
        :raises FileExistsError: there is something at ``dest``.
        :raises OSError: it cannot be written, as on a full disk.
        :raises CaptureFailed: the guest did not come to rest, or the engine refused.
        """
        return await self._capture(dest, None)

    async def snapshot_diff(self, dest: StrPath, base: Image | StrPath) -> Image:
        """As :meth:`snapshot`, but write only the memory that differs from ``base``.

        It is fast if this VM was restored from ``base``; with any other snapshot of a guest of
        the same size all memory is compared. Restoring needs the base, byte for byte as it is.

        :param base: a snapshot, full or itself a diff, or an image that has one.
        :raises SnapshotInvalid: the base is damaged, or no base for this VM.
        """
        place = base if isinstance(base, str | os.PathLike) else base.snapshot
        if place is None:
            raise ConfigError("the base has no snapshot; take it with vm.snapshot, or bake it")
        directory = place.directory if isinstance(place, Snapshot) else place
        return await self._capture(dest, await open_snapshot(directory))

    #: The same calls under the names that users of the Rust library know.
    snapshot_live = snapshot
    snapshot_diff_live = snapshot_diff

    async def _capture(
        self, dest: StrPath, base: Snapshot | None, *, fingerprint: str | None = None
    ) -> Image:
        if self._plan.spec.devices:
            raise NotSupported("snapshot", "a VM with devices of the program's own has no snapshot")
        async with self._capturing:
            snapshot = await capture(
                self._client, self._plan, self.image, dest, base=base, fingerprint=fingerprint
            )
        return attrs.evolve(
            self.image,
            engine="auto",
            snapshot=snapshot,
            memory_mib=snapshot.metadata.memory_mib,
            vcpus=snapshot.metadata.vcpus,
        )

    async def stop(self, grace: float = 5.0) -> None:
        """Shut the guest down in order: stop signals, at most ``grace`` seconds, sync, the end.

        A guest that has not got as far by then is killed, and so is one whose agent does not
        answer. When this returns the machine has ended. The block goes on, but calls to the
        guest raise :exc:`VmExited`. Cancelled, it kills the machine.
        """
        if not 0 <= grace <= 3600:
            raise ValueError("grace must be 0 to 3600 seconds")
        self._stopping = True
        try:
            with trio.move_on_after(grace + _POWER_OFF):
                with suppress(OSError, VmExited, ExecEof):
                    answer = await self._client.call(wire.shutdown(round(grace * 1000)))
                    if answer.payload == wire.ALL_IS_WRITTEN:
                        self._machine.kill("shutdown")
                await self._machine.wait_exit()
        finally:
            self._machine.kill()
        await self._wait_end()

    async def _wait_end(self) -> None:
        """Wait until the machine has ended, and have all that is asked about this VM say so."""
        exit_ = await self._machine.wait_exit()
        if self._exited is None:
            trace("vm", "%r exited: %s", self, exit_.reason)
            self._exited = exited(exit_, self._machine)
            self._network.end(self._exited)
            self._client.release()

    async def _watch(self) -> None:
        await self._wait_end()
        if not self._stopping:
            self._body.cancel()


@asynccontextmanager
async def _start(image: Image, config: VmConfig, workload: bool) -> AsyncIterator[Vm]:
    todo = await plan(image, config, workload=workload)
    async with (
        launched(todo, image, config) as (client, network),
        _running(Vm(image, config, todo, client, network)) as vm,
    ):
        yield vm


@asynccontextmanager
async def _running(vm: Vm) -> AsyncIterator[Vm]:
    try:
        async with open_flat_nursery() as nursery:
            nursery.start_soon(vm._watch)
            await nursery.start(vm._network.run)
            with vm._body:
                yield vm
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # Tasks of the body that were in calls to the guest all tell the same.
        if vm._exited is not None and group.split((VmExited, trio.Cancelled))[1] is None:
            raise vm._exited from None
        raise
    if vm._body.cancelled_caught and vm._exited is not None:
        raise vm._exited


def _request(
    argv: list[StrOrBytes],
    flags: ExecFlags,
    env: Mapping[str, str] | Mapping[bytes, bytes] | None,
    cwd: StrOrBytesPath | None,
    user: str | int | None,
    *,
    columns: int = 0,
    rows: int = 0,
    empty_stdin: bool = False,
) -> ExecRequest:
    if env is not None:
        flags |= ExecFlags.REPLACE_ENV
    return ExecRequest(
        chain=[argv],
        flags=flags,
        columns=columns,
        rows=rows,
        cwd="" if cwd is None else guest_path(cwd),
        user="" if user is None else user_field(user),
        environment=[env_entry(key, value) for key, value in (env or {}).items()],
        empty_stdin=empty_stdin,
    )
