"""Pools: the hand-over, whole cycles, their rate with several workers, and an idle VM's memory.

usage: python benchmarks/pool.py [--cycles N] [--vms N] [REFERENCE]

A cycle is acquire, ``true``, release, and every VM is used once. The memory is the proportional
set size of the engines' processes: what VMs share counts once, in equal parts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import trio

from trio_supermachine import Image, Pool

Rows = dict[str, tuple[str, list[float]]]


def note(rows: Rows, name: str, value: float, unit: str = "ms") -> None:
    rows.setdefault(name, (unit, []))[1].append(value)


async def full(pool: Pool) -> None:
    """Wait until the pool has its idle VMs again, and does nothing else."""
    while (stats := pool.stats()).idle < stats.min or stats.starting or stats.ending:  # noqa: ASYNC110
        await trio.sleep(0.01)


async def unhurried(image: Image, cycles: int, rows: Rows) -> None:
    """One acquirer that comes when the pool is full, and nothing else runs."""
    async with image.pool().min(2).max(4).build() as pool:
        for _ in range(cycles):
            await full(pool)
            start = time.perf_counter()
            async with pool.acquire() as vm:
                acquired = time.perf_counter()
                await vm.run_process(["true"])
            end = time.perf_counter()
            note(rows, "hand-over of an idle warm VM", (acquired - start) * 1e3)
            note(rows, "acquire, true, release", (end - start) * 1e3)


async def kept(image: Image, cycles: int, rows: Rows) -> None:
    """The same where the VM is kept, so that no restore runs beside the exec."""
    async with image.pool().min(1).max(1).restore_on_release(False).build() as pool:
        for _ in range(cycles):
            start = time.perf_counter()
            async with pool.acquire() as vm:
                await vm.run_process(["true"])
            note(rows, "acquire, true, release of a kept VM", (time.perf_counter() - start) * 1e3)


async def hurried(image: Image, workers: int, cycles: int, rows: Rows) -> None:
    """Workers that acquire as fast as they can: restores are what takes the time."""

    async def work(pool: Pool, share: int) -> None:
        for _ in range(share):
            async with pool.acquire() as vm:
                await vm.run_process(["true"])

    async with image.pool().min(2).max(2 + 2 * workers).build() as pool:
        processor = time.process_time()
        start = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(workers):
                nursery.start_soon(work, pool, len(range(number, cycles, workers)))
        elapsed = time.perf_counter() - start
        processor = (time.process_time() - processor) * 1e3 / cycles
    note(rows, f"cycles with {workers} workers", cycles / elapsed, "1/s")
    note(rows, f"our own CPU time for one, with {workers} workers", processor)


def pss_mib() -> list[float]:
    """The proportional set size of each child process."""
    sizes = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(") ")[2].split()[1])
            if parent == os.getpid():
                rollup = (stat.parent / "smaps_rollup").read_text()
                sizes.append(int(rollup.partition("\nPss:")[2].split()[0]) / 1024)
        except (OSError, IndexError):
            continue  # it has ended meanwhile
    return sizes


async def idle_memory(image: Image, vms: int, rows: Rows) -> None:
    """What one more idle VM costs."""
    async with image.pool().min(1).max(vms).build() as pool:
        first = sum(pss_mib())
        note(rows, "memory of the first idle VM", first, "MiB")
        start = time.perf_counter()
        pool.resize(min=vms)
        await full(pool)
        note(rows, f"filling a pool from 1 to {vms}", (time.perf_counter() - start) * 1e3)
        each = (sum(pss_mib()) - first) / (vms - 1)
        note(rows, f"memory of each further idle VM, of {vms}", each, "MiB")
        before = time.process_time()
        await trio.sleep(5)
        note(rows, f"our CPU time in 5 s with {vms} idle", (time.process_time() - before) * 1e3)


def table(rows: Rows, engine: str) -> None:
    print(f"{'':48} {'median':>9} {'p99':>9} unit   engine")
    for name, (unit, values) in rows.items():
        worst_last = sorted(values, reverse=unit == "1/s")
        p99 = worst_last[min(len(values) - 1, int(len(values) * 0.99))]
        print(f"{name:48} {statistics.median(values):9.2f} {p99:9.2f} {unit:6} {engine}")


async def main(reference: str, cycles: int, vms: int) -> None:
    rows: Rows = {}
    image = await Image.from_oci(reference)
    start = time.perf_counter()
    async with image.acquire() as vm:
        await vm.run_process(["true"])
        note(rows, "without a pool: restore and true", (time.perf_counter() - start) * 1e3)
        engine = vm.engine
    await unhurried(image, cycles, rows)
    await kept(image, cycles, rows)
    for workers in (1, 2, 4):
        await hurried(image, workers, cycles, rows)
    await idle_memory(image, vms, rows)
    table(rows, engine)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=40)
    parser.add_argument("--vms", type=int, default=20)
    parser.add_argument("reference", nargs="?", default="builtin:busybox")
    arguments = parser.parse_args()
    trio.run(main, arguments.reference, arguments.cycles, arguments.vms)
