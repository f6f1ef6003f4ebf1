"""VMs on KVM as users have them, beside the QEMU engine and what the host takes for less; and how
often their guests leave for this program.

Both engines restore the same image under the same kernel, in one run. Where KVM is itself
emulated, QEMU's guests are emulated twice: give them few rounds, or 0 for none. An exit is a
return of KVM_RUN to this program, for an access to a port or to memory that is a device's, or
"interrupted" by this program.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from common import MIB, idle_builder, scratch, start, usual_kernel
from streams import EXEC, STDOUT, host_calls, vm_calls, vm_stdin, vm_stdout
from table import Rows

from trio_supermachine import Image, Vm
from trio_supermachine.config.defaults import EngineName
from trio_supermachine.hv.base import Captured
from trio_supermachine.hv.kvm.machine import KvmMachine

#: Reads the layer's disk again and again, past the guest's cache.
READ = (
    "for i in $(seq {times}); do dd if=/dev/vda bs=4k iflag=direct of=/dev/null 2>/dev/null; done"
)
RESTORE, WRITE, STOP = "nothing to the first exec's end", "write_file, 1 KiB", "stop"
FORK = "fork and exec of true"
#: What is to be reached where KVM is emulated on two processors, and nothing else runs.
TARGETS = {RESTORE: 500, EXEC: 20, WRITE: 10, STDOUT: 25, STOP: 100}


@contextmanager
def exits(vm: Vm, rows: Rows, name: str, per: float) -> Iterator[None]:
    """Add how often the guest leaves in the block, for each of ``per`` things done there."""
    if not isinstance(vm._running.client.machine, KvmMachine):
        yield
        return
    before = vm._running.client.machine.exits
    yield
    add_exits(rows, name, before, vm._running.client.machine.exits, per)


def add_exits(
    rows: Rows, name: str, before: Mapping[str, int], after: Mapping[str, int], per: float
) -> None:
    """All of them, and of each reason that occurred."""
    rows.add(f"exits {name}", (sum(after.values()) - sum(before.values())) / per, "")
    for reason, count in after.items():
        if more := count - before.get(reason, 0):
            rows.add(f"exits {name}, {reason}", more / per, "")


def watch_captures(vm: Vm, rows: Rows) -> None:
    """Add how long the guest stands still in each capture."""
    capture: Callable[..., Any] = vm._running.client.machine.capture

    async def watched(*args: Any, **options: Any) -> Captured:
        captured: Captured = await capture(*args, **options)
        rows.add("live snapshot: standstill", captured.standstill * 1e3)
        return captured

    vm._running.client.machine.capture = watched  # type: ignore[method-assign]


@asynccontextmanager
async def restored(image: Image, rows: Rows) -> AsyncIterator[Vm]:
    begin = time.perf_counter()
    async with Vm.start(image) as vm:
        rows.add("restore: the agent has answered", (time.perf_counter() - begin) * 1e3)
        await vm.run_process(["true"])
        rows.add(RESTORE, (time.perf_counter() - begin) * 1e3)
        if isinstance(vm._running.client.machine, KvmMachine):
            add_exits(
                rows, "of a restore and its first exec", {}, vm._running.client.machine.exits, 1
            )
        yield vm
        left = time.perf_counter()
    rows.add("leaving the block", (time.perf_counter() - left) * 1e3)


async def once(image: Image, place: Path, rows: Rows, calls: int, size: int, count: int) -> None:
    async with restored(image, rows) as vm:
        await vm_calls(vm, rows, calls)
        with exits(vm, rows, "of an exec", calls):
            for _ in range(calls):
                await vm.run_process(["true"])
        with exits(vm, rows, "of writing a file", calls):
            for _ in range(calls):
                await vm.write_file("/tmp/file", bytes(1024))
        mb = size / 1e6
        with exits(vm, rows, "for each MB of stdout", mb):
            await vm_stdout(vm, rows, size)
        with exits(vm, rows, "for each MB of stdin", mb):
            await vm_stdin(vm, rows, size)
        await reads(vm, rows, count)
        watch_captures(vm, rows)
        with rows.timed("live snapshot: the whole call"):
            await vm.snapshot(place / "snapshot")
        shutil.rmtree(place / "snapshot")
    async with restored(image, rows) as vm:
        with rows.timed(STOP):
            await vm.stop()


async def reads(vm: Vm, rows: Rows, count: int) -> None:
    """Read the first layer's disk, 4 KiB at a time."""
    size = await vm.run_process(["cat", "/sys/block/vda/size"], capture_stdout=True)
    blocks = int(size.stdout) // 8
    times = -(-count // blocks)
    before = time.perf_counter()
    with exits(vm, rows, "for each 1000 reads of a disk", times * blocks / 1000):
        await vm.run_process(["sh", "-ec", READ.format(times=times)])
    elapsed = time.perf_counter() - before
    rows.add("4 KiB read of a disk by dd", elapsed * 1e6 / times / blocks, "us")


def floors(rows: Rows, calls: int) -> None:
    """What the same Python takes on the host for something that is less than an exec."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as cat:
        assert cat.stdin is not None
        assert cat.stdout is not None
        for _ in range(calls):
            with rows.timed("one byte to cat and back, by pipes"):
                cat.stdin.write(b"x")
                cat.stdout.read(1)
        cat.stdin.close()
    for _ in range(calls):
        with rows.timed(FORK):
            subprocess.run(["true"], check=True)


async def main(
    rounds: int, calls: int, mib: int, reads: int, qemu_rounds: int
) -> AsyncIterator[Rows]:
    kernel = await usual_kernel()
    rows = Rows(title=f"{rounds} rounds of {calls} calls, kernel {kernel.release}")
    rows.compare(EXEC, FORK)
    engines: tuple[tuple[EngineName, int], ...] = (("kvm", rounds), ("qemu", qemu_rounds))
    with scratch() as place:
        for engine, count in engines:
            if count:
                image = await idle_builder(engine).build()
                await once(image, place, Rows(engine), 4, MIB, 1)  # fills caches
            rows.by = engine
            for _ in range(count):
                await once(image, place, rows, calls, mib * MIB, reads)
    rows.by = "host"
    await host_calls(rows, calls)
    floors(rows, calls)
    for name, target in TARGETS.items():
        bound = "over" if name == STDOUT else "below"
        rows.notes.append(f"{name}: {rows.median(name, by='kvm'):.1f} (target: {bound} {target})")
    yield rows


if __name__ == "__main__":
    start(
        main,
        __doc__,
        kvm="linux",
        rounds=(5, 1),
        calls=(40, 4),
        mib=(16, 1),
        reads=(1000, 100),
        qemu_rounds=(0, 0),
    )
