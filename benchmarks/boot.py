"""From nothing to a guest that answers, beside a QEMU driven by hand.

Both boot the same kernel under the same emulation, and take turns in one run. The raw guest is a
busybox shell that says READY on a virtio-serial port; ours is the real init, which loads its
modules and greets (HELLO) over a vsock stream. The engine's memory is 256 MiB, as the raw one's.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from common import start
from raw_qemu import NEEDS, RawQemu
from table import Rows

from trio_supermachine.hv.base import Engine, MachineSpec
from trio_supermachine.hv.select import choose_engine
from trio_supermachine.kernels import prepare_kernel

LIFELINE = 1029
OURS, RAW = "boot to the agent's greeting", "boot to READY, by hand"


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


async def main(rounds: int) -> AsyncIterator[Rows]:
    engine = await choose_engine()
    kernel = await prepare_kernel()
    spec = MachineSpec(kernel=kernel.kernel, initramfs=kernel.initramfs)
    rows = Rows(engine.name, f"{rounds} rounds, kernel {kernel.release}")
    rows.compare(OURS, RAW)
    for _ in range(rounds):
        rows.add(RAW, boot_raw(RawQemu(kernel.kernel, "sleep 1000")), by="raw QEMU")
        answered, ended = await boot(engine, spec)
        rows.add(OURS, answered)
        rows.add("teardown of a machine", ended)
    rows.notes.append("target of the ratio: at most 1.3")
    yield rows


if __name__ == "__main__":
    start(main, __doc__, needs=NEEDS, rounds=(10, 1))
