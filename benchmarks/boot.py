"""From nothing to a guest that answers, beside a QEMU driven by hand.

usage: python benchmarks/boot.py [--rounds N]

Both boot the same kernel under the same emulation, and take turns in one run. The raw guest is a
busybox shell that says READY on a virtio-serial port; ours is the real init, which loads its
modules and greets (HELLO) over a vsock stream. The engine's memory is 256 MiB, as the raw one's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import trio
from raw_qemu import RawQemu

from trio_supermachine.hv.base import Engine, MachineSpec
from trio_supermachine.hv.select import choose_engine
from trio_supermachine.kernels import prepare_kernel

LIFELINE = 1029


async def boot(engine: Engine, spec: MachineSpec) -> tuple[float, float]:
    """Milliseconds until the guest has greeted, and of the machine's teardown after that."""
    start = time.perf_counter()
    async with engine.open(spec) as machine:
        stream = await machine.listen(LIFELINE).accept()
        assert await stream.receive_some()
        answered = time.perf_counter()
        await stream.aclose()
    return (answered - start) * 1e3, (time.perf_counter() - answered) * 1e3


def boot_raw(raw: RawQemu) -> float:
    start = time.perf_counter()
    with raw:
        return (time.perf_counter() - start) * 1e3


def row(name: str, values: list[float], engine: str) -> None:
    p99 = sorted(values)[-max(1, len(values) // 100)]
    print(f"{name:<34} {statistics.median(values):9.1f} {p99:9.1f}  ms    {engine}")


async def main(rounds: int) -> None:
    engine = await choose_engine()
    kernel = await prepare_kernel()
    spec = MachineSpec(kernel=kernel.kernel, initramfs=kernel.initramfs)
    ours: list[float] = []
    ends: list[float] = []
    by_hand: list[float] = []
    for _ in range(rounds):
        by_hand.append(boot_raw(RawQemu(kernel.kernel, "sleep 1000")))
        answered, ended = await boot(engine, spec)
        ours.append(answered)
        ends.append(ended)
    print(f"{rounds} rounds, kernel {kernel.release}")
    print(f"{'':<34} {'median':>9} {'p99':>9}  unit  engine")
    row("boot to the agent's greeting", ours, engine.name)
    row("boot to READY, by hand", by_hand, "raw QEMU")
    row("teardown of a machine", ends, engine.name)
    ratio = statistics.median(ours) / statistics.median(by_hand)
    print(f"ratio {ratio:.2f} (target: at most 1.3)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    trio.run(main, parser.parse_args().rounds)
