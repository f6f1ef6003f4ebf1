"""QEMU as an engine: emulation (TCG) on any host.

A block of :meth:`QemuEngine.open` owns, from the outside in: this side's ends of the channels, the
process, and the task that serves them (:mod:`.machine`). QEMU's own descriptors are this program's
only until the process has inherited them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import final

from ..._util.nursery import open_flat_nursery
from ...errors import AssetNotFound, NotSupported
from ...guest import launcher_binary
from ...host.assets import AssetPaths, find_qemu
from ..base import Engine, EngineReport, Machine, MachineSpec, Restore
from .command import CPU, MACHINE, MachineFds, RestoreFds, command_line
from .firmware import check_room
from .machine import QemuMachine
from .probe import host_cpu, probe_binary, tsc_khz, version
from .process import REAP_TIMEOUT, engine_process


@final
class QemuEngine(Engine):
    """Engine with one QEMU process for each machine, driven over QMP.

    :param assets: the place of QEMU, if not one where :func:`find_qemu` looks by itself.
    """

    name = "qemu"

    def __init__(self, assets: AssetPaths | None = None) -> None:
        self._assets = assets

    async def probe(self) -> EngineReport:
        try:
            qemu = find_qemu(self._assets)
        except AssetNotFound as exc:
            return EngineReport(
                name=self.name, available=False, detail=exc.reason, remedy=exc.remedy
            )
        return await probe_binary(qemu)

    async def host_facts(self) -> Mapping[str, str]:
        return {
            "qemu": await version(find_qemu(self._assets)),
            "machine": MACHINE,
            "cpu": CPU,
            # The TSC of an emulated guest is the host's, and its kernel knows the frequency.
            "host-cpu": host_cpu(),
        }

    def open(self, spec: MachineSpec) -> AbstractAsyncContextManager[Machine]:
        return self._open(spec)

    @asynccontextmanager
    async def _open(self, spec: MachineSpec) -> AsyncIterator[Machine]:
        if spec.devices:
            raise NotSupported("devices", "only the KVM engine runs devices of the program's own")
        if spec.kernel is not None and spec.initramfs is not None:
            check_room(spec.kernel, spec.initramfs, spec.memory_mib)
        qemu = find_qemu(self._assets)
        launcher = launcher_binary()
        khz = await tsc_khz(launcher)
        async with AsyncExitStack() as ours:
            with ExitStack() as theirs:
                qmp, qmp_fd = _channel(ours, theirs)
                console, console_fd = _channel(ours, theirs)
                vsock, vsock_fd = _channel(ours, theirs)
                disks = tuple(_open_disk(theirs, disk.path, disk.readonly) for disk in spec.disks)
                restore = _open_restore(theirs, spec.restore) if spec.restore else None
                fds = MachineFds(
                    qmp=qmp_fd, console=console_fd, vsock=vsock_fd, disks=disks, restore=restore
                )
                argv = command_line(qemu, spec, fds, tsc_khz=khz)
                # The memory that a restored machine has of its own is mostly translated code. Huge
                # pages cost it more memory than they save time; a boot gains by them.
                lean = spec.restore is not None
                process = await ours.enter_async_context(
                    engine_process(launcher, argv, fds.all, lean=lean)
                )
            machine = QemuMachine(
                process,
                qmp=qmp,
                console=console,
                vsock=vsock,
                memory_size=spec.memory_mib << 20,
                restore=spec.restore,
                state_fd=restore.state if restore else None,
            )
            async with open_flat_nursery() as nursery:
                nursery.start_soon(machine._run)
                try:
                    await machine._start()
                    yield machine
                finally:
                    machine._end_within(REAP_TIMEOUT)


def _channel(ours: AsyncExitStack, theirs: ExitStack) -> tuple[socket.socket, int]:
    mine, other = socket.socketpair()
    ours.callback(mine.close)
    theirs.callback(other.close)
    return mine, other.fileno()


def _open_restore(files: ExitStack, restore: Restore) -> RestoreFds:
    state = os.open(restore.state, os.O_RDONLY | os.O_CLOEXEC)
    files.callback(os.close, state)
    # QEMU opens it again for writing, although its writes stay in its private mapping.
    memory = os.open(restore.memory, os.O_RDWR | os.O_CLOEXEC)
    files.callback(os.close, memory)
    return RestoreFds(state=state, memory=memory)


def _open_disk(files: ExitStack, path: Path, readonly: bool) -> int:
    fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
    files.callback(os.close, fd)
    return fd
