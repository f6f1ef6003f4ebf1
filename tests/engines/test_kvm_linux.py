"""What a real Linux makes of a KVM machine, and what its root cannot do to the host."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import pytest
import trio

from trio_supermachine import Image, Vm, VmConfig, VmExited
from trio_supermachine.api import unbaked_image
from trio_supermachine.errors import StartTimeout
from trio_supermachine.hv.base import Disk, Machine, MachineSpec
from trio_supermachine.hv.qemu.engine import QemuEngine

from ..support import GUEST_PROGRAMS
from ..support.echo import echoing
from ..support.guests import CLOCK
from ..support.kvm_guest import remains, scripted_with
from ..support.qemu_guest import console_until, scripted

try:
    from trio_supermachine.hv.kvm.engine import KvmEngine
except ImportError:
    pytest.skip("the package was built without the KVM binding", allow_module_level=True)

pytestmark = pytest.mark.kvm

MEMORY_MIB = 131  # nothing else in this process is of that size
PATIENCE = 120
HOSTILE = GUEST_PROGRAMS / "hostile.c"


@pytest.fixture(autouse=True)
def no_machine_is_left() -> None:
    assert remains(MEMORY_MIB) == []


@asynccontextmanager
async def opened(spec: MachineSpec) -> AsyncIterator[Machine]:
    """A machine that is open, in a test that gives up; nothing of it remains."""
    with trio.fail_after(PATIENCE):
        async with KvmEngine().open(attrs.evolve(spec, memory_mib=MEMORY_MIB)) as machine:
            yield machine
    assert remains(MEMORY_MIB) == []


@asynccontextmanager
async def started(image: Image, vcpus: int = 1) -> AsyncIterator[Vm]:
    config = VmConfig(
        engine="kvm", memory_mib=MEMORY_MIB, vcpus=vcpus, start_timeout=90, restore_timeout=60
    )
    async with Vm.start(image, config) as vm:
        yield vm


@pytest.fixture
async def image() -> Image:
    return await unbaked_image("builtin:busybox")


async def output(vm: Vm, script: str) -> str:
    done = await vm.run_process(["sh", "-c", script], capture_stdout=True)
    return done.stdout.decode().strip()


# --- the machine that Linux finds ---


@pytest.mark.lab
@pytest.mark.parametrize(
    ("script", "reason", "detail"),
    [
        ("poweroff -f", "shutdown", ""),
        ("reboot -f", "reset", "triple fault"),
        ("echo c > /proc/sysrq-trigger", "reset", "Kernel panic - not syncing: sysrq"),
        ("exit 3", "reset", "Kernel panic - not syncing: Attempted to kill init!"),
    ],
)
async def test_how_linux_ends_is_told(
    tmp_path: Path, script: str, reason: str, detail: str
) -> None:
    async with opened(await scripted(tmp_path, f"printf 'last words'\n{script}\nsleep 100")) as m:
        end = await m.wait_exit()
        assert (end.reason, end.detail.startswith(detail)) == (reason, True), end
        assert b"last words" in m.console.tail(100_000)


@pytest.mark.lab
@pytest.mark.several_vcpus
@pytest.mark.parametrize("vcpus", [1, 2, 4])
async def test_every_vcpu_works_and_gets_its_interrupts(tmp_path: Path, vcpus: int) -> None:
    script = (
        "echo cpus=$(nproc); i=0; while [ $i -lt $(nproc) ]; do"
        " taskset $(printf %x $((1 << i))) sh -c 'usleep 20000; head -c 99999 /dev/vda >/dev/null';"
        " i=$((i+1)); done; cat /proc/interrupts; echo end; sleep 1000"
    )
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(1 << 20))
    spec = attrs.evolve(await scripted(tmp_path, script), vcpus=vcpus, disks=(Disk(path=disk),))
    async with opened(spec) as machine:
        seen = (await console_until(machine, b"end\r\n")).decode()
    assert f"cpus={vcpus}\r\n" in seen
    local = re.search(r"LOC:((?: +\d+)+)", seen)
    assert local is not None
    ticks = [int(count) for count in local.group(1).split()]
    assert len(ticks) == vcpus
    assert all(ticks), ticks
    assert "PCI-MSI" in seen


async def test_disks_appear_in_order_and_keep_what_is_written(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b'a,b ="\xff\n{x}')
    odd.mkdir()
    disks = []
    for index in range(24):
        path = odd / f"{index},,="
        path.write_bytes(f"disk {index}".encode().ljust(512))
        disks.append(Disk(path=path, readonly=index != 3))
    script = (
        "for d in /sys/block/vd*; do n=${d##*/}; echo $n=$(head -c 8 /dev/$n)=$(cat $d/ro); done;"
        "for n in a d; do echo new > /dev/vd$n; done; sync; echo end; sleep 1000"
    )
    spec = attrs.evolve(await scripted(odd, script), disks=tuple(disks))
    async with opened(spec) as machine:
        seen = (await console_until(machine, b"end\r\n")).decode()
    for index in range(24):
        assert f"vd{chr(97 + index)}=disk {index} ={int(index != 3)}\r\n" in seen
    assert disks[0].path.read_bytes().startswith(b"disk 0")
    assert disks[3].path.read_bytes().startswith(b"new\n")


async def test_a_guest_may_have_more_memory_than_the_host(tmp_path: Path) -> None:
    spec = await scripted(tmp_path, "head -1 /proc/meminfo; sleep 1000")
    with trio.fail_after(PATIENCE):
        async with KvmEngine().open(attrs.evolve(spec, memory_mib=6000)) as machine:
            seen = await console_until(machine, b" kB\r\n")
    assert 5_500_000 < int(seen.partition(b"MemTotal:")[2].split()[0]) < 6000 * 1024


async def test_too_little_memory_is_an_end_or_a_timeout_that_says_so(image: Image) -> None:
    with pytest.raises((VmExited, StartTimeout, ValueError)):
        async with Vm.start(image, VmConfig(engine="kvm", memory_mib=24, start_timeout=30)):
            raise AssertionError("it was started")
    assert remains(24) == []


_DEVICES = (
    "for d in /sys/bus/virtio/devices/*; do"
    " echo dev $(cat $d/device) $(cat $d/features);"
    " for b in $d/block/*/size; do [ -e $b ] && echo size $(cat $b) $(cat ${b%/*}/ro)"
    " $(cat ${b%/*}/queue/logical_block_size); done; done;"
    " sha256sum </dev/vda; echo end; sleep 1000"
)
_CONSOLE, _VSOCK = "0x0003", "0x0013"
#: What QEMU's devices offer beyond ours (virtio 1.2 §5.2.3, §6): a disk's geometry, topology and
#: switchable cache, discarding and zeroing what is read-only, and resetting one queue.
_MORE_OF_QEMU = {4, 10, 11, 13, 14, 40}


async def test_the_devices_are_those_of_the_qemu_engine(tmp_path: Path) -> None:
    """But for the channel: there a serial port, and here a vsock device."""
    disk = tmp_path / "disk"
    disk.write_bytes(random.Random(8).randbytes(3 << 20))
    spec = attrs.evolve(await scripted(tmp_path, _DEVICES), disks=(Disk(path=disk),))
    found = []
    for engine in (KvmEngine(), QemuEngine()):
        async with engine.open(attrs.evolve(spec, memory_mib=MEMORY_MIB)) as machine:
            # In the lab QEMU's guest is translated twice.
            seen = (await console_until(machine, b"end\r\n", patience=2 * PATIENCE)).decode()
        devices = {
            words[1]: {at for at, bit in enumerate(words[2]) if bit == "1"}
            for words in (line.split() for line in seen.splitlines())
            if words and words[0] == "dev"
        }
        found.append((devices, re.findall(r"size .*|[0-9a-f]{64}  -", seen)))
    (ours, our_disk), (theirs, their_disk) = found
    assert ours.keys() - theirs.keys() == {_VSOCK}
    assert theirs.keys() - ours.keys() == {_CONSOLE}
    for device in ours.keys() & theirs.keys():
        assert not ours[device] - theirs[device], device
        assert theirs[device] - ours[device] <= _MORE_OF_QEMU, device
    assert our_disk == their_disk


# --- its life ---


@pytest.mark.lab
@pytest.mark.several_vcpus
async def test_streams_go_on_through_pauses_and_captures(image: Image, tmp_path: Path) -> None:
    async with started(image, vcpus=2) as vm:
        async with echoing(vm, 600_000, 30_000):
            for number in range(4):
                await vm.pause()
                await vm.resume()
                await vm.snapshot(tmp_path / str(number))
        before = time.time()
        assert before - CLOCK <= int(await output(vm, "date +%s")) <= time.time() + 1


#: In a session of its own before its exec ends, which would take it along.
SERVE = "setsid sh -c '(nc -ll -p 8000 -e cat) </dev/null >/dev/null 2>&1 &'; true"


@pytest.mark.several_vcpus
async def test_copies_of_copies_are_whole_and_their_own(image: Image, tmp_path: Path) -> None:
    ask = (
        "head -c16 /dev/urandom | od -An -tx8; cat /proc/sys/kernel/random/uuid"
        " /etc/machine-id /proc/sys/kernel/random/boot_id"
    )
    async with started(image, vcpus=4) as vm:
        await vm.write_file("/root/data", data := random.Random(2).randbytes(300_000))
        await output(vm, SERVE)
        with trio.fail_after(PATIENCE):
            assert await vm.wait_listening() == 8000
        source = await vm.snapshot(tmp_path / "full")
    answers = []
    for generation in range(6):
        async with Vm.start(source, VmConfig(restore_timeout=60)) as vm:
            assert vm.started_by == "restore"
            assert await vm.read_file("/root/data") == data
            assert await output(vm, "echo hello | nc 127.0.0.1 8000") == "hello"
            before = time.time()
            assert before - CLOCK <= int(await output(vm, "date +%s")) <= time.time() + 1
            answers.append((await output(vm, ask)).splitlines())
            answers.append((await output(vm, ask)).splitlines()[:2] + [str(generation)] * 2)
            if generation % 2:
                source = await vm.snapshot_diff(tmp_path / str(generation), source)
    for kind in zip(*answers, strict=True):
        assert len(set(kind)) == len(answers), kind


@pytest.mark.several_vcpus
async def test_random_cancellations_leave_nothing(image: Image, tmp_path: Path) -> None:
    rng = random.Random(9)

    async def cancelled(longest: float, action: str, source: Image | None = None) -> None:
        with trio.move_on_after(rng.uniform(0, longest)), suppress(VmExited):
            if source is not None:
                async with Vm.start(source) as copy:
                    await copy.run_process(["true"])
                    await copy.stop()
            elif action == "start":
                async with started(image) as other:
                    await other.stop()

    async with started(image, vcpus=2) as vm:
        began = trio.current_time()
        source = await vm.snapshot(tmp_path / "snap")
        capturing = trio.current_time() - began
        for number in range(30):
            with trio.move_on_after(rng.uniform(0, 1.2 * capturing)):
                await vm.snapshot(tmp_path / f"snap{number}")
            assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
            with trio.move_on_after(rng.uniform(0, 0.5)):
                await vm.run_process(["sleep", "7654"])
        assert "7654" not in await output(vm, "ps | grep sleep | grep -v grep || true")
    assert remains(MEMORY_MIB) == []
    for _ in range(20):
        await cancelled(4, "restore", source)
        assert remains(MEMORY_MIB) == []
    for _ in range(10):
        await cancelled(10, "start")
        assert remains(MEMORY_MIB) == []


# --- root in the guest means harm ---


@pytest.mark.several_vcpus
@pytest.mark.parametrize("what", ["b", "c", "m", "p", "bm", "bcmpr"])
async def test_whatever_root_does_to_the_hardware_the_host_is_whole(
    tmp_path: Path, what: str
) -> None:
    """Registers, configuration, windows on top of each other, ports, drivers that come and go."""
    disks = []
    for name, readonly in (("a", True), ("b", False)):
        (tmp_path / name).write_bytes(bytes(1 << 20))
        disks.append(Disk(path=tmp_path / name, readonly=readonly))
    script = f"hostile {ord(what[0])} 6000 {what}; poweroff -f"
    spec = await scripted_with(tmp_path, script, HOSTILE)
    async with opened(attrs.evolve(spec, vcpus=2, disks=tuple(disks))) as machine:
        with trio.move_on_after(PATIENCE / 2):  # it may hang itself
            end = await machine.wait_exit()
            assert end.reason in ("shutdown", "reset", "failed")
        assert b"bytes of registers" in machine.console.tail(1 << 20)
    assert disks[0].path.read_bytes() == bytes(1 << 20)


@pytest.mark.several_vcpus
async def test_a_guest_that_forks_and_floods_is_stopped_at_once(image: Image) -> None:
    flood = "while :; do echo flood; done >/dev/console"
    async with started(image, vcpus=2) as vm:
        script = f"for i in 1 2 3 4 5 6; do ({flood}) & done; wait"
        with pytest.raises(VmExited):
            async with vm.exec(["sh", "-c", script]):
                await vm.stop(grace=0.2)


@pytest.mark.several_vcpus
async def test_a_disk_under_load_keeps_every_byte(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(16 << 20))
    script = (
        "dd if=/dev/urandom of=/seed bs=64k count=32 2>/dev/null; i=0;"
        "while [ $i -lt 8 ]; do dd if=/seed of=/dev/vda bs=$((4096 << i)) seek=$(((512 >> i) * i))"
        " conv=fsync 2>/dev/null & i=$((i+1)); done; wait; sync;"
        "echo 3 >/proc/sys/vm/drop_caches; sha256sum /dev/vda; echo end; sleep 1000"
    )
    spec = attrs.evolve(
        await scripted(tmp_path, script), vcpus=2, disks=(Disk(path=disk, readonly=False),)
    )
    async with opened(spec) as machine:
        seen = (await console_until(machine, b"end\r\n")).decode()
    content = disk.read_bytes()
    assert hashlib.sha256(content).hexdigest() in seen
    assert content.count(content[: 1 << 20]) == 8
