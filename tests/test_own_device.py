"""A device that a program brings along, seen by a guest's own driver."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

import pytest
import trio

from trio_supermachine import Image, NotSupported, Vm, VmConfig
from trio_supermachine.devices.virtio import ID_ENTROPY, Queue, VirtioDevice


class Dice(VirtioDevice):
    """Entropy that is none: the same bytes in each run."""

    device_id: ClassVar[int] = ID_ENTROPY
    queue_sizes = (8,)

    async def run(self, queues: Sequence[Queue]) -> None:
        (queue,) = queues
        source = random.Random(6)
        while True:
            await queue.wait()
            while (chain := queue.pop()) is not None:
                for part in chain.writable:
                    part[:] = source.randbytes(len(part))
                queue.push(chain, chain.writable_size)
                queue.interrupt()
                await trio.lowlevel.cancel_shielded_checkpoint()


@pytest.mark.kvm
async def test_a_guest_reads_from_a_device_of_the_programs_own(busybox: Image) -> None:
    config = VmConfig(engine="kvm").with_device(Dice)
    script = (
        "cd /sys/class/misc/hw_random; echo virtio_rng.1 >rng_current; cat rng_current;"
        "dd if=/dev/hwrng bs=64 count=4 2>/dev/null | od -An -v -tx1 | tr -d ' \\n'"
    )
    async with Vm.start(busybox, config) as vm:
        done = await vm.run_process(["sh", "-c", script], capture_stdout=True)
        name, digits = done.stdout.decode().split("\n")
        assert name == "virtio_rng.1"
        # The kernel takes some for itself first, and drops what it had from the other.
        assert digits[-64:] in random.Random(6).randbytes(1 << 16).hex()
        with pytest.raises(NotSupported):
            await vm.snapshot("nowhere")


@pytest.mark.vm
async def test_an_engine_without_a_place_for_it_says_so(busybox: Image) -> None:
    with pytest.raises(NotSupported, match="only the KVM engine"):
        async with Vm.start(busybox, VmConfig(engine="qemu").with_device(Dice)):
            raise AssertionError("started")
