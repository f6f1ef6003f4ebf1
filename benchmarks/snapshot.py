"""Snapshots of a running VM: how long its guest stands still, how long the call takes, what is
written; and diffs beside full ones.

usage: python benchmarks/snapshot.py [--rounds N]

The guest has 256 MiB. It stands still for the longest gap in the lines that a program of it
prints all the time, as the host sees them come; the same gap without a snapshot stands beside it.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import trio
from common import Rows, home_of, idle_builder, kernels, start

from trio_supermachine import Image, Vm
from trio_supermachine.kernels import CachedKernel

MIB = 1 << 20
#: Without a sleep: on an emulated CPU a line takes about a tenth of a millisecond.
LINES = "while :; do echo x; done"
FILL = 160  # MiB, beside what a guest needs anyway
CHAIN = 3
LITTLE, MUCH = "little in use", "200 MiB in use"


class Gaps:
    """The longest time between two chunks that a guest's program printed, in milliseconds."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self, stream: trio.abc.ReceiveStream) -> None:
        last = None
        async for _ in stream:
            now = time.perf_counter()
            if last is not None:
                self.longest = max(self.longest, (now - last) * 1e3)
            last = now


def written(directory: Path) -> float:
    """MiB that a snapshot takes on the disk."""
    return sum(file.stat().st_blocks * 512 for file in directory.iterdir()) / MIB


async def fill(vm: Vm) -> None:
    """Have most of the guest's memory in use."""
    await vm.run_process(["mount", "-o", "remount,size=90%", "/dev/shm"])
    async with vm.open_write("/dev/shm/fill") as stream:
        for _ in range(FILL):
            await stream.send_all(os.urandom(MIB))


async def nothing(vm: Vm) -> None:
    """Leave the guest as it is."""


async def work(vm: Vm) -> None:
    """A little of it."""
    await vm.write_file("/tmp/result", bytes(1000))
    await vm.run_process(["sh", "-c", "sort /tmp/result | wc -c >/tmp/count"])


async def live(vm: Vm, dest: Path, rows: Rows, label: str) -> None:
    """Snapshot a VM that prints all the time."""
    gaps = Gaps()
    async with vm.exec(["sh", "-c", LINES]) as child, trio.open_nursery() as nursery:
        nursery.start_soon(gaps.watch, child.stdout)
        await trio.sleep(0.5)
        gaps.longest = 0.0
        await trio.sleep(0.5)
        rows.add(f"{label}: longest gap without a snapshot", gaps.longest)
        gaps.longest = 0.0
        begin = time.perf_counter()
        await vm.snapshot(dest)
        rows.add(f"{label}: the whole call", (time.perf_counter() - begin) * 1e3)
        await trio.sleep(0.1)
        rows.add(f"{label}: longest gap", gaps.longest)
        child.kill()
    rows.add(f"{label}: written", written(dest), "MiB")
    shutil.rmtree(dest)


async def diffs(image: Image, place: Path, rows: Rows, label: str) -> None:
    """A full snapshot and a diff of a restored VM after little work, in turns; then a chain."""
    async with image.start() as vm:
        await work(vm)
        begin = time.perf_counter()
        await vm.snapshot(place / "full")
        rows.add(f"{label}: full snapshot after little work", (time.perf_counter() - begin) * 1e3)
        begin = time.perf_counter()
        await vm.snapshot_diff(place / "diff", image)
        rows.add(f"{label}: diff after little work", (time.perf_counter() - begin) * 1e3)
    rows.add(f"{label}: that full snapshot", written(place / "full"), "MiB")
    rows.add(f"{label}: that diff", written(place / "diff"), "MiB")
    shutil.rmtree(place / "full")
    shutil.rmtree(place / "diff")
    chain = image
    for number in range(CHAIN):
        async with chain.start() as vm:
            await work(vm)
            chain = await vm.snapshot_diff(place / str(number), chain)
    for name, one in (("the full snapshot", image), (f"a chain of {CHAIN} diffs", chain)):
        for _ in range(3):
            begin = time.perf_counter()
            async with one.start() as vm:
                await vm.run_process(["true"])
                rows.add(
                    f"{label}: restore and true, of {name}", (time.perf_counter() - begin) * 1e3
                )
    for number in range(CHAIN):
        shutil.rmtree(place / str(number))


async def measure(kernel: CachedKernel, rounds: int) -> None:
    rows = Rows()
    with home_of(kernel) as home:
        image = await idle_builder().build()
        filled = await idle_builder().with_warmup(fill).build()
        for _ in range(rounds):
            for label, base, prepare in ((LITTLE, image, nothing), (MUCH, filled, fill)):
                async with image.start() as vm:
                    await prepare(vm)
                    await live(vm, home / "live", rows, label)
                await diffs(base, home, rows, label)
    print(f"{rounds} rounds, {kernel.kind} kernel {kernel.release}")
    rows.print()
    print("longest gap: target: below 100 ms")
    for label in (LITTLE, MUCH):
        size = rows.median(f"{label}: that diff") / rows.median(f"{label}: that full snapshot")
        duration = rows.median(f"{label}: diff after little work") / rows.median(
            f"{label}: full snapshot after little work"
        )
        print(
            f"{label}: a diff is {size:.2f} of the size and {duration:.2f} of the time of a full"
            " snapshot (target: below 0.1)"
        )
    print()


async def main(rounds: int) -> None:
    async for kernel in kernels():
        await measure(kernel, rounds)


if __name__ == "__main__":
    start(main, __doc__, rounds=5)
