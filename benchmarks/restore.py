"""From nothing to a restored guest's first exec, beside a QEMU that is restored by hand.

Both go on from a snapshot of a guest of 256 MiB under the same kernel and the same emulation, and
take turns in one run, once for each kernel. The raw guest is a busybox shell that echoes a line by
way of a program, and had done so before it was saved; ours is ``Vm.start`` and
``run_process(["true"])``, of an image as it is and of one whose warm-up has run that. The steps are
those of the second.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

from common import idle_builder, kernels, start
from raw_qemu import NEEDS, RawSnapshot
from table import Rows

from trio_supermachine import Image, Vm
from trio_supermachine.hv.base import Engine, Machine, MachineSpec
from trio_supermachine.hv.select import choose_engine
from trio_supermachine.kernels import CachedKernel

OURS = "nothing to the first exec"
WARMED = "nothing to the first exec, after a warm-up"
RAW = "nothing to the first answer"
MACHINE, LOADED = "step: the machine is there", "step: its state is loaded, CPUs run"
ANSWER = "step: the first answer"


async def warm_up(vm: Vm) -> None:
    for _ in range(5):
        await vm.run_process(["true"])


async def restore(image: Image, name: str, rows: Rows) -> None:
    """Start a VM as users do."""
    begin = time.perf_counter()
    async with Vm.start(image) as vm:
        await vm.run_process(["true"])
        rows.add(name, (time.perf_counter() - begin) * 1e3)
        left = time.perf_counter()
    rows.add("leaving the block", (time.perf_counter() - left) * 1e3)


class Steps:
    """The time since the step before, added as a row."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._last = time.perf_counter()

    def add(self, name: str) -> None:
        now = time.perf_counter()
        self._rows.add(name, (now - self._last) * 1e3)
        self._last = now


@contextmanager
def watched(engine: type[Engine], steps: Steps) -> Iterator[None]:
    """Add the steps of an engine's machines that start in the block."""
    open_machine = engine.open

    @asynccontextmanager
    async def opened(self: Engine, spec: MachineSpec) -> AsyncIterator[Machine]:
        steps.add("step: deciding what to start")
        async with open_machine(self, spec) as machine:
            steps.add(MACHINE)
            resume = machine.resume

            async def resumed() -> None:
                await resume()
                steps.add(LOADED)

            machine.resume = resumed  # type: ignore[method-assign]
            yield machine

    def watching(self: Engine, spec: MachineSpec) -> AbstractAsyncContextManager[Machine]:
        return opened(self, spec)

    engine.open = watching  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.open = open_machine  # type: ignore[method-assign]


async def phases(image: Image, rows: Rows) -> None:
    """The same, one step after another."""
    engine = type(await choose_engine(image.engine))
    steps = Steps(rows)
    with watched(engine, steps):
        async with Vm.start(image) as vm:
            steps.add("step: the agent is told, and thaws")
            await vm.run_process(["true"])
            steps.add(ANSWER)
            await vm.run_process(["true"])
            steps.add("step: the second exec")


def restore_raw(raw: RawSnapshot, rows: Rows) -> None:
    ready, loaded, answered = raw.restore()
    by = "raw QEMU"
    rows.add(RAW, answered, by=by)
    rows.add(MACHINE, ready, by=by)
    rows.add(LOADED, loaded - ready, by=by)
    rows.add(ANSWER, answered - loaded, by=by)


async def compare(kernel: CachedKernel, rounds: int) -> Rows:
    rows = Rows(title=f"{rounds} rounds, {kernel.kind} kernel {kernel.release}")
    for name in (OURS, WARMED):
        rows.compare(name, RAW)
    for name in (MACHINE, LOADED, ANSWER):
        rows.compare(name, by="raw QEMU")
    with RawSnapshot(kernel.kernel) as raw:
        image = await idle_builder().build()
        warmed = await idle_builder().with_warmup(warm_up).build()
        assert image.snapshot is not None
        rows.by = image.snapshot.metadata.engine
        for number in range(rounds + 1):
            one = rows if number else Rows(rows.by)  # the first round fills caches
            restore_raw(raw, one)
            await restore(image, OURS, one)
            await restore(warmed, WARMED, one)
            await phases(warmed, one)
    rows.notes.append("target of the ratio: at most 1.25")
    return rows


async def main(rounds: int, kernel: str) -> AsyncIterator[Rows]:
    async for one in kernels(kernel):
        yield await compare(one, rounds)


if __name__ == "__main__":
    start(main, __doc__, needs=NEEDS, rounds=(20, 1), kernel=("all", "usual"))
