"""Pools: the hand-over, whole cycles, their rate with several workers, and an idle VM's memory.

A cycle is acquire, ``true``, release, and every VM is used once. The memory is the proportional
set size of the engines' processes, which on KVM is this one: what VMs share counts once, in equal
parts.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import trio
from common import engine_processes, start
from table import Rows

from trio_supermachine import Image, Pool

ALONE = "without a pool: restore and true"
HANDED = "hand-over of an idle warm VM"
CYCLE = "acquire, true, release"


async def full(pool: Pool) -> None:
    """Wait until the pool has its idle VMs again, and does nothing else."""
    while (stats := pool.stats()).idle < stats.min or stats.starting or stats.ending:  # noqa: ASYNC110
        await trio.sleep(0.01)


async def unhurried(image: Image, cycles: int, rows: Rows) -> None:
    """One acquirer that comes when the pool is full, and nothing else runs."""
    async with image.pool().min(2).max(4).build() as pool:
        for _ in range(cycles):
            await full(pool)
            begin = time.perf_counter()
            async with pool.acquire() as vm:
                rows.add(HANDED, (time.perf_counter() - begin) * 1e3)
                await vm.run_process(["true"])
            rows.add(CYCLE, (time.perf_counter() - begin) * 1e3)


async def kept(image: Image, cycles: int, rows: Rows) -> None:
    """The same where the VM is kept, so that no restore runs beside the exec."""
    async with image.pool().min(1).max(1).restore_on_release(False).build() as pool:
        for _ in range(cycles):
            with rows.timed(f"{CYCLE} of a kept VM"):
                async with pool.acquire() as vm:
                    await vm.run_process(["true"])


async def hurried(image: Image, workers: int, cycles: int, rows: Rows) -> None:
    """Workers that acquire as fast as they can: restores are what takes the time."""

    async def work(pool: Pool, share: int) -> None:
        for _ in range(share):
            async with pool.acquire() as vm:
                await vm.run_process(["true"])

    async with image.pool().min(2).max(2 + 2 * workers).build() as pool:
        processor = time.process_time()
        begin = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(workers):
                nursery.start_soon(work, pool, len(range(number, cycles, workers)))
        elapsed = time.perf_counter() - begin
        processor = (time.process_time() - processor) * 1e3 / cycles
    rows.add(f"cycles with {workers} workers", cycles / elapsed, "1/s")
    rows.add(f"our own CPU time for one, with {workers} workers", processor, by="host")


def pss_mib(engine: str) -> float:
    """The proportional set size of all processes that run VMs."""
    size = 0
    for pid in engine_processes(engine):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        size += int(rollup.partition("\nPss:")[2].split()[0])
    return size / 1024


async def idle_memory(image: Image, vms: int, seconds: int, rows: Rows) -> None:
    """What one more idle VM costs."""
    async with image.pool().min(1).max(vms).build() as pool:
        first = pss_mib(rows.by)
        rows.add("memory of the first idle VM, and what all share", first, "MiB")
        with rows.timed(f"filling a pool from 1 to {vms}"):
            pool.resize(min=vms)
            await full(pool)
        each = (pss_mib(rows.by) - first) / (vms - 1)
        rows.add(f"memory of each further idle VM, of {vms}", each, "MiB")
        before = time.process_time()
        await trio.sleep(seconds)
        used = (time.process_time() - before) * 1e3 / seconds
        rows.add(f"our CPU time in a second with {vms} idle", used, by="host")


async def main(reference: str, cycles: int, vms: int, seconds: int) -> AsyncIterator[Rows]:
    image = await Image.from_oci(reference)
    rows = Rows(title=f"{cycles} cycles, {image.reference}")
    for name in (HANDED, CYCLE, f"{CYCLE} of a kept VM"):
        rows.compare(name, ALONE)
    for _ in range(cycles):
        begin = time.perf_counter()
        async with image.acquire() as vm:
            await vm.run_process(["true"])
            rows.by = vm.engine
            rows.add(ALONE, (time.perf_counter() - begin) * 1e3)
    await unhurried(image, cycles, rows)
    await kept(image, cycles, rows)
    for workers in (1, 2, 4):
        await hurried(image, workers, cycles, rows)
    await idle_memory(image, vms, seconds, rows)
    yield rows


if __name__ == "__main__":
    start(
        main,
        __doc__,
        reference=("builtin:busybox", "builtin:busybox"),
        cycles=(40, 2),
        vms=(20, 2),
        seconds=(5, 1),
    )
