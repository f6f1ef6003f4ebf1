"""A device that a program brings along to its VM."""

from __future__ import annotations

import pytest

from trio_supermachine import Image, NotSupported, Vm, VmConfig
from trio_supermachine.devices.rng import RngDevice

pytestmark = pytest.mark.lab


@pytest.mark.kvm
async def test_a_guest_has_a_device_of_the_programs_own(busybox: Image) -> None:
    config = VmConfig(engine="kvm").with_device(RngDevice).with_device(RngDevice)
    async with Vm.start(busybox, config) as vm:
        found = await vm.read_file("/sys/class/misc/hw_random/rng_available")
        assert [name for name in found.split() if name.startswith(b"virtio")] == [
            b"virtio_rng.0",
            b"virtio_rng.1",
            b"virtio_rng.2",
        ]
        with pytest.raises(NotSupported):
            await vm.snapshot("nowhere")


@pytest.mark.kvm
async def test_what_a_device_raises_as_it_is_made_comes_out_as_itself(busybox: Image) -> None:
    def broken() -> RngDevice:
        raise FileNotFoundError("dice")

    with pytest.raises(FileNotFoundError, match="dice"):
        async with Vm.start(busybox, VmConfig(engine="kvm").with_device(broken)):
            raise AssertionError("started")


@pytest.mark.vm
async def test_an_engine_without_a_place_for_it_says_so(busybox: Image) -> None:
    with pytest.raises(NotSupported, match="only the KVM engine"):
        async with Vm.start(busybox, VmConfig(engine="qemu").with_device(RngDevice)):
            raise AssertionError("started")
