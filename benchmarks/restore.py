"""From nothing to a restored guest's first exec, beside a QEMU that is restored by hand.

usage: python benchmarks/restore.py [--rounds N]

Both go on from a snapshot of a guest of 256 MiB under the same kernel and the same emulation, and
take turns in one run, once for each kernel that is here. The raw guest is a busybox shell that
echoes a line by way of a program, and had done so before it was saved; ours is ``Vm.start`` and
``run_process(["true"])``, of an image as it is and of one whose warm-up has run that.
"""

from __future__ import annotations

import time

from common import Rows, home_of, idle_builder, kernels, start
from raw_qemu import RawSnapshot

from trio_supermachine import Image, Vm, VmConfig
from trio_supermachine.agent.client import AgentClient
from trio_supermachine.kernels import CachedKernel
from trio_supermachine.programs.child import open_exec
from trio_supermachine.programs.request import exec_request
from trio_supermachine.vm.launch import _renewal
from trio_supermachine.vm.plan import plan_start

OURS = "nothing to the first exec"
WARMED = "nothing to the first exec, after a warm-up"
RAW = "nothing to the first answer, by hand"
RAW_PHASES = ("by hand: to QMP", "by hand: state loaded, CPUs run", "by hand: first answer")


async def warm_up(vm: Vm) -> None:
    for _ in range(5):
        await vm.run_process(["true"])


async def restore(image: Image, name: str, rows: Rows) -> None:
    """As users do it."""
    begin = time.perf_counter()
    async with Vm.start(image) as vm:
        await vm.run_process(["true"])
        answered = time.perf_counter()
        rows.add(name, (answered - begin) * 1e3)
    rows.add("teardown of the VM", (time.perf_counter() - answered) * 1e3)


async def phases(image: Image, rows: Rows) -> None:
    """The same of the warmed-up image, one step after another."""
    last = time.perf_counter()

    def step(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        rows.add(name, (now - last) * 1e3)
        last = now

    config = VmConfig()
    todo = await plan_start(image, config)
    step("step: deciding what to start")
    async with todo.engine.open(todo.spec) as machine:
        step("step: to QMP")
        client = AgentClient(machine)
        await machine.resume()
        step("step: state loaded, CPUs run")
        await client.restored(_renewal(None))
        step("step: the agent is told, and thaws")
        for number in ("first", "second"):
            async with open_exec(client, exec_request([["true"]])):
                pass
            step(f"step: {number} exec")
        await client.aclose()


def restore_raw(raw: RawSnapshot, rows: Rows) -> None:
    ready, loaded, answered = raw.restore()
    rows.add(RAW, answered, by="raw QEMU")
    for name, value in zip(RAW_PHASES, (ready, loaded - ready, answered - loaded), strict=True):
        rows.add(name, value, by="raw QEMU")


async def compare(kernel: CachedKernel, rounds: int) -> None:
    rows = Rows()
    with home_of(kernel), RawSnapshot(kernel.kernel) as raw:
        image = await idle_builder().build()
        warmed = await idle_builder().with_warmup(warm_up).build()
        for number in range(rounds + 1):
            # The first round fills caches.
            one = rows if number else Rows()
            restore_raw(raw, one)
            await restore(image, OURS, one)
            await restore(warmed, WARMED, one)
            await phases(warmed, one)
    print(f"{rounds} rounds, {kernel.kind} kernel {kernel.release}")
    rows.print()
    ratio, warmed_ratio = (rows.median(name) / rows.median(RAW) for name in (OURS, WARMED))
    print(f"ratio {ratio:.2f}, after a warm-up {warmed_ratio:.2f} (target: at most 1.25)\n")


async def main(rounds: int) -> None:
    async for kernel in kernels():
        await compare(kernel, rounds)


if __name__ == "__main__":
    start(main, __doc__, rounds=20)
