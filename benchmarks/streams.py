"""Execs and streams of a warm VM, beside a raw virtio-serial port of a QEMU driven by hand.

usage: python benchmarks/streams.py [--rounds N]

Raw QEMU and this library take turns in one run, with the same kernel. The raw guest is a busybox
shell whose dd copies straight between /dev/zero or /dev/null and the port, with no pipe, process
or protocol in between: once with QEMU's ``-cpu max``, and once with the engine's own CPU flags.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio
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

Rows = dict[str, list[float]]


@contextmanager
def timed(rows: Rows, name: str, scale: float = 1e3) -> Iterator[None]:
    start = time.perf_counter()
    yield
    rows.setdefault(name, []).append((time.perf_counter() - start) * scale)


def rate(seconds: float) -> float:
    return SIZE / 1e6 / seconds


def raw_streams(kernel: Path, cpu: str, rows: Rows, label: str) -> None:
    with RawQemu(kernel, RAW_SCRIPT, cpu=cpu) as port:
        port.sendall(b"start\n")
        port.sendall(b"out\n")
        start = time.perf_counter()
        left = SIZE
        while left:
            left -= len(port.recv(min(left, 1 << 18)))
        rows.setdefault(f"{label}: guest to host", []).append(rate(time.perf_counter() - start))
        port.sendall(b"in\n")
        time.sleep(0.2)  # dd must have the port before the data comes
        start = time.perf_counter()
        chunk = bytes(1 << 16)
        for _ in range(SIZE >> 16):
            port.sendall(chunk)
        assert port.recv(16) == b"done\n"
        rows.setdefault(f"{label}: host to guest", []).append(rate(time.perf_counter() - start))


async def vm_streams(vm: Vm, rows: Rows) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    total = 0
    async with vm.exec(["dd", "if=/dev/zero", "bs=64k", f"count={SIZE >> 16}"]) as child:
        async for chunk in child.stdout:
            total += len(chunk)
    assert total == SIZE
    rows.setdefault("stdout of an exec", []).append(rate(time.perf_counter() - start))
    chunk = bytes(1 << 16)
    start = time.perf_counter()
    async with vm.exec(["dd", "of=/dev/null", "bs=64k"]) as child:
        assert child.stdin is not None
        for _ in range(SIZE >> 16):
            await child.stdin.send_all(chunk)
        await child.stdin.aclose()
        assert await child.wait() == 0
    rows.setdefault("stdin of an exec", []).append(rate(time.perf_counter() - start))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows.setdefault("growth of the host's memory meanwhile", []).append((after - before) / 1024)


async def vm_calls(vm: Vm, rows: Rows) -> None:
    for _ in range(CALLS):
        with timed(rows, "run_process(['true'])"):
            await vm.run_process(["true"])
    for _ in range(CALLS // 4):
        start = time.perf_counter()
        async with vm.exec(["sh", "-c", "echo x; read x"]) as child:
            await child.stdout.receive_some()
            elapsed = (time.perf_counter() - start) * 1e3
            rows.setdefault("first byte of a streaming exec", []).append(elapsed)
            assert child.stdin is not None
            await child.stdin.send_all(b"\n")
            await child.wait()
    for _ in range(CALLS // 4):
        with timed(rows, "write_file, 1 KiB"):
            await vm.write_file("/tmp/file", bytes(1024))
        with timed(rows, "read_file, 1 KiB"):
            await vm.read_file("/tmp/file")
    for _ in range(3):
        with timed(rows, f"{AT_ONCE} execs of true at once"):
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(vm.run_process, ["true"])
    before = time.process_time()
    await trio.sleep(5)
    rows["this process's CPU time in 5 s with an idle VM"] = [(time.process_time() - before) * 1e3]


def table(rows: Rows, engine: str) -> None:
    print(f"{'':48} {'median':>9} {'p99':>9} unit   engine")
    for name, values in rows.items():
        unit = "MB/s" if any(w in name for w in ("to host", "to guest", "of an exec")) else "ms"
        if "byte of" in name:
            unit = "ms"
        if "memory" in name:
            unit = "MiB"
        worst_first = sorted(values, reverse=unit == "MB/s")
        p99 = worst_first[min(len(values) - 1, int(len(values) * 0.99))]
        kind = "raw QEMU" if name.startswith("raw") else engine
        print(f"{name:48} {statistics.median(values):9.2f} {p99:9.2f} {unit:6} {kind}")


async def main(rounds: int) -> None:
    kernel = (await prepare_kernel()).kernel
    rows: Rows = {}
    async with Vm.start(await Image.from_oci("builtin:busybox")) as vm:
        await vm.run_process(["true"])
        for _ in range(rounds):
            raw_streams(kernel, "max", rows, "raw port, -cpu max")
            raw_streams(kernel, CPU, rows, f"raw port, -cpu {CPU}")
            await vm_streams(vm, rows)
        await vm_calls(vm, rows)
        table(rows, vm.engine)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    trio.run(main, parser.parse_args().rounds)
