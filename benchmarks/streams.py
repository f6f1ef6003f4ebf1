"""Execs and streams of a warm VM, beside a raw virtio-serial port of a QEMU driven by hand.

usage: python benchmarks/streams.py [--rounds N]

Raw QEMU and this library take turns in one run, with the same kernel. The raw guest is a busybox
shell whose dd copies straight between /dev/zero or /dev/null and the port, with no pipe, process
or protocol in between: once with QEMU's ``-cpu max``, and once with the engine's own CPU flags.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import trio
from common import Rows, start
from raw_qemu import RawQemu

from trio_supermachine import Image, Vm
from trio_supermachine.hv.qemu.command import CPU
from trio_supermachine.kernels import prepare_kernel

SIZE = 64 << 20
CALLS = 200
AT_ONCE = 50

RAW_SCRIPT = f"""\
read -r line <&3
while :; do
    read -r line <&3 || exit
    case $line in
        out) dd if=/dev/zero bs=32k count={SIZE >> 15} >&3 2>/dev/null;;
        in) dd of=/dev/null bs=64k iflag=fullblock count={SIZE >> 16} <&3 2>/dev/null
            echo done >&3;;
    esac
done
"""


def rate(seconds: float, size: int = SIZE) -> float:
    return size / 1e6 / seconds


def raw_streams(kernel: Path, cpu: str, rows: Rows) -> None:
    by = f"raw QEMU, -cpu {cpu}"
    with RawQemu(kernel, RAW_SCRIPT, cpu=cpu) as port:
        port.sendall(b"start\n")
        port.sendall(b"out\n")
        start = time.perf_counter()
        left = SIZE
        while left:
            left -= len(port.recv(min(left, 1 << 18)))
        rows.add("port: guest to host", rate(time.perf_counter() - start), "MB/s", by=by)
        port.sendall(b"in\n")
        time.sleep(0.2)  # dd must have the port before the data comes
        start = time.perf_counter()
        chunk = bytes(1 << 16)
        for _ in range(SIZE >> 16):
            port.sendall(chunk)
        assert port.recv(16) == b"done\n"
        rows.add("port: host to guest", rate(time.perf_counter() - start), "MB/s", by=by)


async def vm_stdout(vm: Vm, rows: Rows, size: int = SIZE) -> None:
    start = time.perf_counter()
    total = 0
    async with vm.exec(["dd", "if=/dev/zero", "bs=64k", f"count={size >> 16}"]) as child:
        async for chunk in child.stdout:
            total += len(chunk)
    assert total == size
    rows.add("stdout of an exec", rate(time.perf_counter() - start, size), "MB/s")


async def vm_stdin(vm: Vm, rows: Rows, size: int = SIZE) -> None:
    chunk = bytes(1 << 16)
    start = time.perf_counter()
    async with vm.exec(["dd", "of=/dev/null", "bs=64k"]) as child:
        assert child.stdin is not None
        for _ in range(size >> 16):
            await child.stdin.send_all(chunk)
        await child.stdin.aclose()
        assert await child.wait() == 0
    rows.add("stdin of an exec", rate(time.perf_counter() - start, size), "MB/s")


async def vm_calls(vm: Vm, rows: Rows, calls: int = CALLS) -> None:
    for _ in range(calls):
        with rows.timed("run_process(['true'])"):
            await vm.run_process(["true"])
    for _ in range(calls // 4):
        begin = time.perf_counter()
        async with vm.exec(["sh", "-c", "echo x; read x"]) as child:
            await child.stdout.receive_some()
            rows.add("first byte of a streaming exec", (time.perf_counter() - begin) * 1e3)
            assert child.stdin is not None
            await child.stdin.send_all(b"\n")
            await child.wait()
    for _ in range(calls // 4):
        with rows.timed("write_file, 1 KiB"):
            await vm.write_file("/tmp/file", bytes(1024))
        with rows.timed("read_file, 1 KiB"):
            await vm.read_file("/tmp/file")


async def vm_at_once(vm: Vm, rows: Rows) -> None:
    with rows.timed(f"{AT_ONCE} execs of true at once"):
        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(vm.run_process, ["true"])


async def main(rounds: int) -> None:
    kernel = (await prepare_kernel()).kernel
    async with Vm.start(await Image.from_oci("builtin:busybox")) as vm:
        await vm.run_process(["true"])
        rows = Rows(vm.engine)
        for _ in range(rounds):
            raw_streams(kernel, "max", rows)
            raw_streams(kernel, CPU, rows)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            await vm_stdout(vm, rows)
            await vm_stdin(vm, rows)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            rows.add("growth of the host's memory meanwhile", (after - before) / 1024, "MiB")
        await vm_calls(vm, rows)
        for _ in range(3):
            await vm_at_once(vm, rows)
        begin = time.process_time()
        await trio.sleep(5)
        used = (time.process_time() - begin) * 1e3
        rows.add("this process's CPU time in 5 s with an idle VM", used)
        rows.print()


if __name__ == "__main__":
    start(main, __doc__, rounds=3)
