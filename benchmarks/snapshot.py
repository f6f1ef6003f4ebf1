"""Snapshots of a running VM: how long its guest stands still, how long the call takes, what is
written; and diffs beside full ones.

The guest has 256 MiB. It stands still for the longest gap in the lines that a program of it
prints all the time, as the host sees them come; the same gap without a snapshot stands beside it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import trio
from common import MIB, idle_builder, kernels, scratch, start
from table import Rows

from trio_supermachine import Image, Vm
from trio_supermachine.kernels import CachedKernel

#: Without a sleep: on an emulated CPU a line takes about a tenth of a millisecond.
LINES = "while :; do echo x; done"
LITTLE, MUCH = "little in use", "much in use"


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


async def fill(mib: int, vm: Vm) -> None:
    """Have so much more of the guest's memory in use."""
    await vm.run_process(["mount", "-o", "remount,size=90%", "/dev/shm"])
    async with vm.open_write("/dev/shm/fill") as stream:
        for _ in range(mib):
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
        with rows.timed(f"{label}: the whole call"):
            await vm.snapshot(dest)
        await trio.sleep(0.1)
        rows.add(f"{label}: longest gap", gaps.longest)
        child.kill()
    rows.add(f"{label}: written", written(dest), "MiB")
    shutil.rmtree(dest)


async def diffs(image: Image, place: Path, rows: Rows, label: str, chain: int) -> None:
    """A full snapshot and a diff of a restored VM after little work, in turns; then a chain."""
    async with image.start() as vm:
        await work(vm)
        with rows.timed(f"{label}: full snapshot after little work"):
            await vm.snapshot(place / "full")
        with rows.timed(f"{label}: diff after little work"):
            await vm.snapshot_diff(place / "diff", image)
    rows.add(f"{label}: that full snapshot", written(place / "full"), "MiB")
    rows.add(f"{label}: that diff", written(place / "diff"), "MiB")
    shutil.rmtree(place / "full")
    shutil.rmtree(place / "diff")
    last = image
    for number in range(chain):
        async with last.start() as vm:
            await work(vm)
            last = await vm.snapshot_diff(place / str(number), last)
    for name, one in (("the full snapshot", image), (f"a chain of {chain} diffs", last)):
        for _ in range(chain):
            with rows.timed(f"{label}: restore, true and end, of {name}"):
                async with one.start() as vm:
                    await vm.run_process(["true"])
    for number in range(chain):
        shutil.rmtree(place / str(number))


async def measure(kernel: CachedKernel, rounds: int, mib: int, chain: int) -> Rows:
    rows = Rows(title=f"{rounds} rounds, {kernel.kind} kernel {kernel.release}, {mib} MiB filled")
    for label in (LITTLE, MUCH):
        rows.compare(f"{label}: longest gap", f"{label}: longest gap without a snapshot")
        rows.compare(f"{label}: that diff", f"{label}: that full snapshot")
        full = f"{label}: full snapshot after little work"
        rows.compare(f"{label}: diff after little work", full)
        restored = f"{label}: restore, true and end, of"
        rows.compare(f"{restored} a chain of {chain} diffs", f"{restored} the full snapshot")
    fill_up = partial(fill, mib)
    image = await idle_builder().build()
    filled = await idle_builder().with_warmup(fill_up).build()
    assert image.snapshot is not None
    rows.by = image.snapshot.metadata.engine
    with scratch() as place:
        for _ in range(rounds):
            for label, base, prepare in ((LITTLE, image, nothing), (MUCH, filled, fill_up)):
                async with image.start() as vm:
                    await prepare(vm)
                    await live(vm, place / "live", rows, label)
                await diffs(base, place, rows, label, chain)
    rows.notes.append("targets: the longest gap below 100 ms, the ratio of a diff below 0.1")
    return rows


async def main(rounds: int, mib: int, chain: int, kernel: str) -> AsyncIterator[Rows]:
    async for one in kernels(kernel):
        yield await measure(one, rounds, mib, chain)


if __name__ == "__main__":
    start(main, __doc__, rounds=(5, 1), mib=(160, 8), chain=(3, 1), kernel=("all", "usual"))
