"""The KVM engine's virtio devices, beside those of a QEMU that runs the same guest by KVM.

The guest's init measures (``kvm_guest.c``), and the two take turns. It reads a disk whose file is
in the host's page cache, past its own cache: in order by 1 MiB, and 4 KiB anywhere, one after
another or eight at once. Streams go to this program, by vsock and by QEMU's virtio-serial; QEMU's
vsock is the kernel's vhost. The guest's program is compiled by Zig where it is not in ``.lab`` yet.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import trio
from common import MIB, Unavailable, scratch, start, usual_kernel
from table import Rows

from trio_supermachine.hv.base import Disk, MachineSpec
from trio_supermachine.hv.kvm.engine import KvmEngine
from trio_supermachine.kernels import CachedKernel
from trio_supermachine.kernels.initramfs import build_initramfs
from trio_supermachine.kernels.modules import Module

VHOST = "/dev/vhost-vsock"
PORT, CID = 5000, 7
QEMU = "qemu -accel kvm"
SOURCE = Path(__file__).with_name("kvm_guest.c")
CACHE = Path(__file__).resolve().parent.parent / ".lab"
COMPILER = ("-target", "x86_64-linux-musl", "-static", "-Os", "-s", "-std=gnu11", "-D_GNU_SOURCE")

NAMES = {
    "sequential": ("disk: read in order, by 1 MiB", "MB/s"),
    "random": ("disk: read of 4 KiB", "us"),
    "random_8": ("disk: read of 4 KiB, eight at once", "us"),
    "vsock_out": ("vsock: guest to host", "MB/s"),
    "vsock_in": ("vsock: host to guest", "MB/s"),
    "vsock_trip": ("vsock: round trip of a byte", "us"),
    "serial_out": ("virtio-serial: guest to host", "MB/s"),
    "serial_in": ("virtio-serial: host to guest", "MB/s"),
    "serial_trip": ("virtio-serial: round trip of a byte", "us"),
}


def guest_program() -> bytes:
    """The guest's init, compiled once for each version of it."""
    program = CACHE / f"benchmark-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    if not program.exists():
        if importlib.util.find_spec("ziglang") is None:
            raise Unavailable("needs the compiler Zig: pip install ziglang")
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            fresh = Path(directory, "init")
            compiler = [sys.executable, "-m", "ziglang", "cc", *COMPILER]
            subprocess.run([*compiler, SOURCE, "-o", fresh], check=True)
            fresh.rename(program)
    return program.read_bytes()


def initramfs(kernel: CachedKernel) -> bytes:
    modules = [
        Module(name, (kernel.directory / "modules" / f"{name}.ko").read_bytes())
        for name in kernel.modules
    ]
    return build_initramfs(guest_program(), modules)


@attrs.frozen
class Trial:
    """What one guest has to do.

    :ivar size: bytes to move by each stream, and of the disk.
    :ivar count: round trips, and reads.
    """

    spec: MachineSpec
    size: int
    count: int

    async def peer(self, stream: trio.abc.Stream) -> None:
        """The host's end of a stream; the guest says what comes next."""
        left = self.size
        while left:
            left -= len(await self._receive(stream, 256 * 1024))
        await stream.send_all(b"x")
        await self._receive(stream, 1)
        chunk = bytes(64 * 1024)
        for _ in range(self.size // len(chunk)):
            await stream.send_all(chunk)
        for _ in range(self.count):
            await stream.send_all(await self._receive(stream, 1))

    @staticmethod
    async def _receive(stream: trio.abc.Stream, most: int) -> bytes:
        data = bytes(await stream.receive_some(most))
        assert data, "the guest has ended"
        return data


async def report(console: AsyncIterable[bytes | bytearray], rows: Rows) -> None:
    """Add what the guest prints, until its end."""
    text = b""
    async for chunk in console:
        *lines, text = (text + chunk).split(b"\n")
        for line in lines:
            if found := re.fullmatch(rb"=(\w+) (\S.*)", line.strip()):
                name, value = (part.decode() for part in found.groups())
                if name == "end":
                    return
                assert name != "failed", value
                rows.add(NAMES[name][0], float(value), NAMES[name][1])
    raise AssertionError(text)


async def on_kvm(trial: Trial, rows: Rows) -> None:
    async with KvmEngine().open(trial.spec) as machine, trio.open_nursery() as nursery:
        listener = machine.listen(PORT)

        async def serve() -> None:
            async with await listener.accept() as stream:
                await trial.peer(stream)

        nursery.start_soon(serve)
        await report(machine.console, rows)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def qemu(trial: Trial, port: int) -> AsyncIterator[trio.Process]:
    spec = trial.spec
    assert spec.kernel is not None
    assert spec.initramfs is not None
    (disk,) = spec.disks
    words = f"console=ttyS0 reboot=t panic=-1 quiet {spec.cmdline}"
    command: list[str | Path] = [
        *("qemu-system-x86_64", "-M", "microvm,acpi=on,pcie=on", "-accel", "kvm", "-cpu", "host"),
        *("-m", str(spec.memory_mib), "-nodefaults", "-no-user-config", "-display", "none"),
        *("-no-reboot", "-kernel", spec.kernel, "-initrd", spec.initramfs, "-append", words),
        *("-serial", "stdio", "-device", f"vhost-vsock-pci,guest-cid={CID}"),
        *("-blockdev", f"driver=file,node-name=disk,read-only=on,filename={disk.path}"),
        *("-device", "virtio-blk-pci,drive=disk,num-queues=1"),
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=c0,fd={port}"),
        *("-device", "virtserialport,chardev=c0,name=agent"),
    ]
    run = partial(trio.run_process, command, stdout=subprocess.PIPE, check=False, pass_fds=[port])
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(run)
        try:
            yield process
        finally:
            process.kill()


async def on_qemu(trial: Trial, rows: Rows) -> None:
    ours, theirs = socket.socketpair()
    with trio.socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listening:
        await listening.bind((socket.VMADDR_CID_ANY, PORT))
        listening.listen()

        async def serve() -> None:
            accepted, _ = await listening.accept()
            async with trio.SocketStream(accepted) as stream:
                await trial.peer(stream)

        async with (
            trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as serial,
            qemu(trial, theirs.fileno()) as process,
            trio.open_nursery() as nursery,
        ):
            theirs.close()
            assert process.stdout is not None
            nursery.start_soon(serve)
            nursery.start_soon(trial.peer, serial)
            await report(process.stdout, rows)
            nursery.cancel_scope.cancel()


async def main(rounds: int, mib: int, count: int) -> AsyncIterator[Rows]:
    if not os.path.exists(VHOST):  # noqa: ASYNC240
        raise Unavailable(f"needs {VHOST}: modprobe vhost_vsock")
    kernel = await usual_kernel()
    rows = Rows("kvm")
    rows.title = f"{rounds} rounds of {mib} MiB, and {count} reads and round trips"
    for name, _ in NAMES.values():
        rows.compare(name, by=QEMU)
    with scratch() as place:
        (place / "disk").write_bytes(os.urandom(mib * MIB))
        (place / "initramfs").write_bytes(initramfs(kernel))
        spec = MachineSpec(
            kernel=kernel.kernel,
            initramfs=place / "initramfs",
            disks=(Disk(path=place / "disk"),),
            cmdline=f"MIB={mib} COUNT={count}",
        )
        trial = Trial(spec, mib * MIB, count)
        for _ in range(rounds):
            rows.by = "kvm"
            await on_kvm(trial, rows)
            rows.by = QEMU
            await on_qemu(trial, rows)
    yield rows


if __name__ == "__main__":
    start(
        main,
        __doc__,
        needs=("qemu-system-x86_64",),
        kvm="linux",
        prepare=guest_program,
        rounds=(3, 1),
        mib=(32, 1),
        count=(1000, 8),
    )
