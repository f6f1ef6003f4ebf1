"""Execs and streams of a warm VM, beside a raw virtio-serial port of a QEMU driven by hand.

Raw QEMU and this library take turns in one run, with the same kernel. The raw guest is a busybox
shell whose dd copies straight between /dev/zero or /dev/null and the port, with no pipe, process
or protocol in between: once with QEMU's ``-cpu max``, and once with the engine's own CPU flags.
"""

from __future__ import annotations

import resource
import time
from collections.abc import AsyncIterator
from pathlib import Path

import trio
from common import MIB, idle_builder, start
from raw_qemu import NEEDS, RawQemu
from table import Rows

from trio_supermachine import Vm
from trio_supermachine.hv.qemu.command import CPU
from trio_supermachine.kernels import prepare_kernel

OUT, IN = "port: guest to host", "port: host to guest"
STDOUT, STDIN, EXEC = "stdout of an exec", "stdin of an exec", "run_process(['true'])"
HOST = "trio.run_process(['true']), no guest"
OWN_CPU = f"raw QEMU, -cpu {CPU}"

#: To be formatted with the blocks that go out and come in.
RAW_SCRIPT = """\
read -r line <&3
while :; do
    read -r line <&3 || exit
    case $line in
        out) dd if=/dev/zero bs=32k count={out} >&3 2>/dev/null;;
        in) dd of=/dev/null bs=64k iflag=fullblock count={into} <&3 2>/dev/null
            echo done >&3;;
    esac
done
"""


def rate(seconds: float, size: int) -> float:
    return size / 1e6 / seconds


def raw_streams(kernel: Path, cpu: str, rows: Rows, size: int) -> None:
    by = f"raw QEMU, -cpu {cpu}"
    script = RAW_SCRIPT.format(out=size >> 15, into=size >> 16)
    with RawQemu(kernel, script, cpu=cpu) as port:
        port.sendall(b"start\n")
        port.sendall(b"out\n")
        start = time.perf_counter()
        left = size
        while left:
            left -= len(port.recv(min(left, 1 << 18)))
        rows.add(OUT, rate(time.perf_counter() - start, size), "MB/s", by=by)
        port.sendall(b"in\n")
        time.sleep(0.2)  # dd must have the port before the data comes
        start = time.perf_counter()
        chunk = bytes(1 << 16)
        for _ in range(size >> 16):
            port.sendall(chunk)
        assert port.recv(16) == b"done\n"
        rows.add(IN, rate(time.perf_counter() - start, size), "MB/s", by=by)


async def vm_stdout(vm: Vm, rows: Rows, size: int) -> None:
    start = time.perf_counter()
    total = 0
    async with vm.exec(["dd", "if=/dev/zero", "bs=64k", f"count={size >> 16}"]) as child:
        async for chunk in child.stdout:
            total += len(chunk)
    assert total == size
    rows.add(STDOUT, rate(time.perf_counter() - start, size), "MB/s")


async def vm_stdin(vm: Vm, rows: Rows, size: int) -> None:
    chunk = bytes(1 << 16)
    start = time.perf_counter()
    async with vm.exec(["dd", "of=/dev/null", "bs=64k"]) as child:
        assert child.stdin is not None
        for _ in range(size >> 16):
            await child.stdin.send_all(chunk)
        await child.stdin.aclose()
        assert await child.wait() == 0
    rows.add(STDIN, rate(time.perf_counter() - start, size), "MB/s")


async def host_calls(rows: Rows, calls: int) -> None:
    for _ in range(calls):
        with rows.timed(HOST, by="host"):
            await trio.run_process(["true"])


async def vm_calls(vm: Vm, rows: Rows, calls: int) -> None:
    for _ in range(calls):
        with rows.timed(EXEC):
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


async def vm_at_once(vm: Vm, rows: Rows, count: int) -> None:
    with rows.timed(f"{count} execs of true at once"):
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(vm.run_process, ["true"])


async def main(rounds: int, mib: int, calls: int, seconds: int) -> AsyncIterator[Rows]:
    kernel = await prepare_kernel()
    rows = Rows(title=f"{rounds} rounds of {mib} MiB, {calls} calls, kernel {kernel.release}")
    rows.compare(STDOUT, OUT, by=OWN_CPU)
    rows.compare(STDIN, IN, by=OWN_CPU)
    rows.compare(EXEC, HOST)
    size = mib * MIB
    async with Vm.start(await idle_builder().build()) as vm:
        await vm.run_process(["true"])
        rows.by = vm.engine
        for _ in range(rounds):
            raw_streams(kernel.kernel, "max", rows, size)
            raw_streams(kernel.kernel, CPU, rows, size)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            await vm_stdout(vm, rows, size)
            await vm_stdin(vm, rows, size)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            growth = (after - before) / 1024
            rows.add("growth of the host's memory meanwhile", growth, "MiB", by="host")
        await host_calls(rows, calls)
        await vm_calls(vm, rows, calls)
        for _ in range(3):
            await vm_at_once(vm, rows, calls // 4)
        begin = time.process_time()
        await trio.sleep(seconds)
        used = (time.process_time() - begin) * 1e3 / seconds
        rows.add("our CPU time in a second with an idle VM", used, by="host")
    yield rows


if __name__ == "__main__":
    start(main, __doc__, needs=NEEDS, rounds=(3, 1), mib=(64, 1), calls=(200, 4), seconds=(5, 1))
