"""Many idle VMs restored from one snapshot: the memory of each, and the CPU time of all.

Memory is the proportional set size of the engines' processes (what they share counts once, in
equal parts): the guests' memory, which is a copy-on-write mapping of the snapshot, and the engine's
own. On KVM the process is this one, and its own is what VMs have added to it. CPU time is of these
processes, the guests within, and of this process.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import trio
from common import engine_processes, idle_builder, kernels, start
from table import Rows

from trio_supermachine.kernels import CachedKernel

_TICK = os.sysconf("SC_CLK_TCK")


def pss(engine: str, memory: Path) -> tuple[float, float, float]:
    """MiB of the engine's processes: of mappings of ``memory``, of that what guests have changed,
    and of the rest."""
    guest = changed = rest = 0
    for pid in engine_processes(engine):
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


async def measure(kernel: CachedKernel, vms: int, seconds: int) -> Rows:
    image = await idle_builder().build()
    assert image.snapshot is not None
    memory = image.snapshot.memory.root
    rows = Rows(image.snapshot.metadata.engine, f"{kernel.kind} kernel {kernel.release}")
    _, _, without = pss(rows.by, memory)
    async with AsyncExitStack() as stack:
        for _ in range(vms):
            vm = await stack.enter_async_context(image.start())
            await vm.run_process(["true"])
        pids = engine_processes(rows.by)
        guest, changed, rest = pss(rows.by, memory)
        own = rest - without
        rows.add(f"memory of one of {vms} VMs", (guest + own) / vms, "MiB")
        rows.add("of that, the guest's memory", guest / vms, "MiB")
        rows.add("of that, pages that the guest has changed", changed / vms, "MiB")
        rows.add("of that, the engine's own", own / vms, "MiB")
        before, ours = [cpu_ms(pid) for pid in pids], time.process_time()
        await trio.sleep(seconds)
        ours = time.process_time() - ours
        used = [cpu_ms(pid) - begin for pid, begin in zip(pids, before, strict=True)]
        rows.add(f"CPU time of {vms} idle VMs in a second", sum(used) / seconds)
        rows.add("CPU time of this process in a second", ours * 1e3 / seconds, by="host")
    return rows


async def main(vms: int, seconds: int, kernel: str) -> AsyncIterator[Rows]:
    async for one in kernels(kernel):
        yield await measure(one, vms, seconds)


if __name__ == "__main__":
    start(main, __doc__, vms=(20, 2), seconds=(10, 1), kernel=("all", "usual"))
