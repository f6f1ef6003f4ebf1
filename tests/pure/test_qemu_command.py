"""QEMU's command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.errors import ConfigError
from trio_supermachine.hv.base import Disk, MachineSpec
from trio_supermachine.hv.qemu.command import (
    MAX_DISKS,
    MachineFds,
    RestoreFds,
    command_line,
    kernel_command_line,
)

SPEC = MachineSpec(kernel=Path("/k"), initramfs=Path("/i"))
QEMU = Path("/usr/bin/qemu-system-x86_64")


def words(spec: MachineSpec) -> list[bytes]:
    disks = tuple(range(100, 100 + len(spec.disks)))
    return command_line(
        QEMU, spec, MachineFds(qmp=3, console=4, vsock=5, disks=disks), tsc_khz=1000
    )


def values(argv: list[bytes], option: bytes) -> list[bytes]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


def objects(argv: list[bytes], option: bytes) -> list[dict[str, object]]:
    return [json.loads(value) for value in values(argv, option)]


def test_the_process_is_confined_and_has_no_network() -> None:
    argv = words(SPEC)
    (sandbox,) = values(argv, b"-sandbox")
    assert set(sandbox.decode().split(",")) == {
        "on",
        "obsolete=deny",
        "elevateprivileges=deny",
        "spawn=deny",
        "resourcecontrol=deny",
    }
    assert {b"-nodefaults", b"-no-user-config", b"-no-reboot"} <= set(argv)
    assert not any(b"net" in word for word in argv)
    assert not values(argv, b"-monitor")


def test_the_firmware_is_named_for_a_boot_and_for_a_restore() -> None:
    restore = MachineFds(qmp=3, console=4, vsock=5, restore=RestoreFds(state=7, memory=8))
    restored = command_line(QEMU, MachineSpec(), restore, tsc_khz=1000)
    for argv in (words(SPEC), restored):
        assert values(argv, b"-bios") == [b"qboot.rom"]


def test_channels_are_inherited_descriptors() -> None:
    chardevs = values(words(SPEC), b"-chardev")
    assert chardevs == [
        b"socket,id=qmp,fd=3",
        b"socket,id=console,fd=4",
        b"socket,id=vsock,fd=5",
    ]


def test_size_and_processors() -> None:
    argv = words(attrs.evolve(SPEC, memory_mib=777, vcpus=3))
    assert values(argv, b"-m") == [b"777M"]
    assert values(argv, b"-smp") == [b"3"]
    assert objects(argv, b"-object")[0]["size"] == 777 << 20


@pytest.mark.parametrize(("vcpus", "threads"), [(1, b"thread=single"), (2, b"thread=multi")])
def test_several_processors_get_a_thread_each(vcpus: int, threads: bytes) -> None:
    (accelerator,) = values(words(attrs.evolve(SPEC, vcpus=vcpus)), b"-accel")
    assert threads in accelerator.split(b",")


@given(st.integers(0, MAX_DISKS))
def test_every_disk_has_a_place_of_its_own_in_order(count: int) -> None:
    disks = tuple(Disk(path=Path(f"/{index}"), readonly=index % 2 == 0) for index in range(count))
    argv = words(attrs.evolve(SPEC, disks=disks))
    assert values(argv, b"-add-fd") == [
        f"fd={100 + index},set={index}".encode() for index in range(count)
    ]
    nodes = objects(argv, b"-blockdev")
    assert [node["read-only"] for node in nodes] == [disk.readonly for disk in disks]
    devices = [d for d in objects(argv, b"-device") if d["driver"] == "virtio-blk-pci"]
    assert [device["drive"] for device in devices] == [node["node-name"] for node in nodes]
    places = [tuple(int(p, 16) for p in str(d["addr"]).split(".")) for d in devices]
    assert places == sorted(set(places))
    assert all(2 <= slot < 32 and function < 8 for slot, function in places)


def test_more_disks_than_places_are_refused() -> None:
    disks = (Disk(path=Path("/d")),) * (MAX_DISKS + 1)
    with pytest.raises(ConfigError, match=str(MAX_DISKS)):
        words(attrs.evolve(SPEC, disks=disks))


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name and b"/" not in name))
def test_any_file_name_goes_through_unchanged(name: bytes) -> None:
    path = Path("/dir") / os.fsdecode(name)
    if ".." in path.parts:
        return
    argv = words(attrs.evolve(SPEC, kernel=path, initramfs=path))
    assert values(argv, b"-kernel") == values(argv, b"-initrd") == [os.fsencode(path)]


def test_the_callers_kernel_words_come_last_and_win() -> None:
    line = kernel_command_line(attrs.evolve(SPEC, cmdline="a=1 quiet"), 2_000_000)
    assert line.endswith(" tsc_early_khz=2000000 a=1 quiet")
    assert "tsc_early_khz" not in kernel_command_line(SPEC, None)


def test_a_restore_maps_its_memory_privately_and_brings_no_kernel() -> None:
    restore = RestoreFds(state=7, memory=8)
    fds = MachineFds(qmp=3, console=4, vsock=5, restore=restore)
    argv = command_line(QEMU, MachineSpec(), fds, tsc_khz=1000)
    (memory,) = [o for o in objects(argv, b"-object") if o["id"] == "memory"]
    assert (memory["mem-path"], memory["share"]) == ("/proc/self/fd/8", False)
    assert not {b"-kernel", b"-initrd", b"-append"} & set(argv)
    assert values(argv, b"-incoming") == [b"defer"]
    assert {7, 8} <= set(fds.all)


def test_a_machine_without_a_kernel_or_a_state_is_refused() -> None:
    with pytest.raises(ConfigError, match="boots a kernel"):
        words(MachineSpec())
