"""Cancelled anywhere, nothing is left: in the guest, in the engine, or in this process."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
import trio

from trio_supermachine import Image, Vm, VmExited

from ..support.guests import guest_processes
from ..support.processes import child_processes

pytestmark = pytest.mark.vm

CALLS = 170
STARTS = 30


async def one_call(vm: Vm, number: int) -> None:
    marker = str(5000 + number)
    match number % 7:
        case 0:
            await vm.run_process(["sh", "-c", f"sleep {marker} & sleep {marker}"])
        case 1:
            async with vm.exec(["cat", "-", "/dev/null"]) as child:
                assert child.stdin is not None
                while True:
                    await child.stdin.send_all(b"x" * 100_000)
                    await child.stdout.receive_some()
        case 2:
            await vm.write_file("/tmp/cancelled", b"x" * 3_000_000)
        case 3:
            await vm.read_file("/bin/busybox")
        case 4:
            await vm.exec_builder().argv(["sleep", marker]).output()
        case 5:
            async with vm.exec(["sh"], tty=True) as child:
                await child.resize(10, 10)
                await child.signal(28)
                await child.wait()
        case 6:
            async with vm.open_write("/tmp/cancelled") as sink:
                while True:
                    await sink.send_all(b"y" * 65536)


async def test_random_cancellations_leave_nothing_in_the_guest(vm: Vm) -> None:
    rng = random.Random(20)

    async def worker(numbers: range) -> None:
        for number in numbers:
            # Half of them early, where the set-up is; the others over all of the call.
            with trio.move_on_after(rng.choice([0, rng.uniform(0, 0.01), rng.uniform(0, 0.2)])):
                await one_call(vm, number)

    async with trio.open_nursery() as nursery:
        for first in range(2):
            nursery.start_soon(worker, range(first, CALLS, 2))
    for name in ("sleep 5", "cat -"):
        assert await guest_processes(vm, name) == []
    left = await vm.run_process(["ls", "-A", "/tmp"], capture_stdout=True)
    assert left.stdout.split() in ([], [b"cancelled"])
    agent = await vm.run_process(["sh", "-c", "ls /proc/$PPID/fd | wc -l"], capture_stdout=True)
    assert int(agent.stdout) < 40


async def test_random_cancellations_of_start_and_stop_leave_no_engine(busybox: Image) -> None:
    before = child_processes()  # registries of other tests
    rng = random.Random(21)

    async def one(number: int) -> None:
        with trio.move_on_after(rng.uniform(0, 3)):
            async with Vm.start(busybox) as vm:
                with suppress(VmExited):
                    await vm.stop(grace=1)

    limit = trio.CapacityLimiter(3)

    async def limited(number: int) -> None:
        async with limit:
            await one(number)

    async with trio.open_nursery() as nursery:
        for number in range(STARTS):
            nursery.start_soon(limited, number)
    assert child_processes() == before
