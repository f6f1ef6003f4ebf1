"""Many idle VMs restored from one snapshot: the memory of each, and the CPU time of all.

usage: python benchmarks/density.py [--vms N]

Memory is the proportional set size of the engines' processes (what they share counts once, in
equal parts): the guests' memory, which is a copy-on-write mapping of the snapshot, and QEMU's own.
Our own process is not in it. CPU time is of QEMU, its guests within, and of this process.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import AsyncExitStack
from pathlib import Path

import trio
from common import Rows, engine_processes, home_of, idle_builder, kernels

from trio_supermachine.kernels import CachedKernel

IDLE = 10.0  # seconds
_TICK = os.sysconf("SC_CLK_TCK")


def pss(pid: int, memory: Path) -> tuple[float, float, float]:
    """MiB of a process: of its mapping of ``memory``, of that what it changed, and of the rest."""
    guest = changed = rest = 0
    within = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, _, more = line.partition(" ")
        if not first.endswith(":"):
            within = line.endswith(f" {memory}")
        elif first == "Pss:":
            size = int(more.split()[0])
            guest, rest = guest + size * within, rest + size * (not within)
        elif first == "Anonymous:" and within:
            changed += int(more.split()[0])
    return guest / 1024, changed / 1024, rest / 1024


def cpu_ms(pid: int) -> float:
    """The CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1e3 / _TICK


async def measure(kernel: CachedKernel, vms: int) -> None:
    rows = Rows()
    with home_of(kernel):
        image = await idle_builder().build()
        assert image.snapshot is not None
        memory = image.snapshot.memory.root
        async with AsyncExitStack() as stack:
            for _ in range(vms):
                vm = await stack.enter_async_context(image.start())
                await vm.run_process(["true"])
            pids = engine_processes()
            assert len(pids) == vms
            for pid in pids:
                guest, changed, own = pss(pid, memory)
                rows.add(f"memory of one of {vms} VMs", guest + own, "MiB")
                rows.add("of that, the guest's memory", guest, "MiB")
                rows.add("of that, pages that the guest has changed", changed, "MiB")
                rows.add("of that, QEMU's own", own, "MiB")
            before, ours = [cpu_ms(pid) for pid in pids], time.process_time()
            await trio.sleep(IDLE)
            ours = time.process_time() - ours
            used = [cpu_ms(pid) - begin for pid, begin in zip(pids, before, strict=True)]
            rows.add(f"CPU time of {vms} idle VMs in a second", sum(used) / IDLE)
            rows.add("CPU time of this process in a second", ours * 1e3 / IDLE)
    print(f"{kernel.kind} kernel {kernel.release}")
    rows.print()
    print()


async def main(vms: int) -> None:
    async for kernel in kernels():
        await measure(kernel, vms)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vms", type=int, default=20)
    trio.run(main, parser.parse_args().vms)
