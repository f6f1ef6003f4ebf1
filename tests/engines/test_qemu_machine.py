"""Machines on a real QEMU: how they start, talk and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_supermachine import Image, VmConfig
from trio_supermachine.errors import AssetNotFound, EngineUnavailable, VmExited
from trio_supermachine.hv.base import Disk, Machine, MachineSpec
from trio_supermachine.hv.qemu.engine import QemuEngine
from trio_supermachine.hv.qemu.machine import QemuMachine
from trio_supermachine.hv.select import choose_engine
from trio_supermachine.kernels import prepare_kernel
from trio_supermachine.vm.plan import plan_start

from ..pure.test_fake_machine import StepCanceller
from ..support.processes import open_files
from ..support.qemu_guest import console_until, scripted

pytestmark = pytest.mark.vm

LIFELINE = 1029


@pytest.fixture
async def agent_spec() -> MachineSpec:
    """A machine with the real init and agent."""
    boot = await prepare_kernel()
    return MachineSpec(kernel=boot.kernel, initramfs=boot.initramfs)


def pid(machine: Machine) -> int:
    assert isinstance(machine, QemuMachine)
    return machine.pid


async def test_the_guest_dials_and_is_dialled(agent_spec: MachineSpec) -> None:
    async with QemuEngine().open(agent_spec) as machine:
        assert machine.engine == "qemu"
        listener = machine.listen(LIFELINE)
        with pytest.raises(OSError, match="already has a listener"):
            machine.listen(LIFELINE)
        with trio.fail_after(60):
            stream = await listener.accept()
            assert (await stream.receive_some())[4] == 1  # HELLO
            with pytest.raises(ConnectionRefusedError):
                await machine.dial(9)
            await stream.aclose()  # its end: the guest powers off
            assert (await machine.wait_exit()).reason == "shutdown"


@pytest.mark.parametrize(
    ("script", "reason", "detail"),
    [
        ("poweroff -f", "shutdown", ""),
        ("reboot -f", "reset", ""),
        ("echo c > /proc/sysrq-trigger", "reset", "Kernel panic - not syncing: sysrq"),
        ("exit 3", "reset", "Kernel panic - not syncing: Attempted to kill init!"),
    ],
)
async def test_how_the_guest_ends_is_told(
    tmp_path: Path, script: str, reason: str, detail: str
) -> None:
    spec = await scripted(tmp_path, f"echo last words\n{script}\nsleep 100")
    async with QemuEngine().open(spec) as machine:
        with trio.fail_after(60):
            end = await machine.wait_exit()
        assert end.reason == reason
        assert end.detail.startswith(detail)
        assert b"last words" in machine.console.tail(100_000)
        machine.kill()
        assert await machine.wait_exit() is end
        for operation in (machine.pause, machine.resume):
            with pytest.raises(VmExited):
                await operation()
        with pytest.raises(VmExited, match="last words") as caught:
            await machine.dial(1)
        assert caught.value.reason == reason


async def test_the_console_is_readable_to_its_end_by_many(tmp_path: Path) -> None:
    script = "i=0; while [ $i -lt 200 ]; do echo line $i; i=$((i+1)); done; poweroff -f"
    spec = await scripted(tmp_path, script)
    seen: list[bytes] = []

    async def read(machine: Machine) -> None:
        seen.append(b"".join([chunk async for chunk in machine.console]))

    async with QemuEngine().open(spec) as machine, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read, machine)
    assert len(set(seen)) == 1
    assert all(b"line %d\r\n" % index in seen[0] for index in range(200))


async def test_a_killed_qemu_ends_everything_pending(agent_spec: MachineSpec) -> None:
    async with QemuEngine().open(agent_spec) as machine:
        listener = machine.listen(LIFELINE)
        other = machine.listen(77)
        ends: list[str] = []
        with trio.fail_after(60):
            stream = await listener.accept()
            await stream.receive_some()

            async def accept() -> None:
                with pytest.raises(VmExited) as caught:
                    await other.accept()
                ends.append(caught.value.reason)

            async def receive() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
                ends.append("broken")

            async def wait() -> None:
                ends.append((await machine.wait_exit()).reason)

            async with trio.open_nursery() as nursery:
                for task in (accept, receive, wait):
                    nursery.start_soon(task)
                await wait_all_tasks_blocked()
                os.kill(pid(machine), signal.SIGKILL)
        assert sorted(ends) == ["broken", "killed", "killed"]
        with pytest.raises(VmExited, match="signal 9"):
            await machine.dial(1028)
        await stream.aclose()


async def test_pausing_stands_still_and_resuming_goes_on(tmp_path: Path) -> None:
    spec = await scripted(tmp_path, "while :; do read -t 1 x < /dev/zero; echo tick; done")
    async with QemuEngine().open(spec) as machine:
        await console_until(machine, b"tick")
        await machine.pause()
        await machine.pause()
        reader = aiter(machine.console)
        # What was on its way arrives; then nothing does, though the guest writes all the time.
        with trio.move_on_after(0.5):
            while True:
                await anext(reader)
        with trio.move_on_after(0.5) as silence:
            await anext(reader)
        assert silence.cancelled_caught
        await machine.resume()
        await machine.resume()
        with trio.fail_after(60):
            assert await anext(reader)


async def test_a_guest_that_breaks_the_protocol_is_ended(tmp_path: Path) -> None:
    spec = await scripted(tmp_path, "yes > /dev/vport0p1; sleep 100")
    async with QemuEngine().open(spec) as machine:
        with trio.fail_after(60):
            end = await machine.wait_exit()
    assert end.reason == "failed"
    assert "vsock" in end.detail


async def test_disks_appear_in_order_from_files_with_any_name(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b'a,b ="\xff\n{x}')
    odd.mkdir()
    names = [odd / f"{index},,=" for index in range(120)]
    for index, name in enumerate(names):
        name.write_bytes(f"disk {index}".encode().ljust(512))
    script = "for d in /sys/block/vd*; do n=${d##*/}; echo $n=$(head -c 8 /dev/$n); done; echo end"
    spec = await scripted(odd, script + "\nsleep 1000")
    kernel = odd / "kernel,"
    assert spec.kernel is not None
    kernel.symlink_to(spec.kernel)
    disks = tuple(Disk(path=name) for name in names)
    async with QemuEngine().open(attrs.evolve(spec, kernel=kernel, disks=disks)) as machine:
        seen = (await console_until(machine, b"end\r\n")).decode()
    letters = [chr(97 + index) for index in range(26)]
    order = [*letters, *(a + b for a in letters for b in letters)]
    for index, suffix in enumerate(order[:120]):
        assert f"vd{suffix}=disk {index}\r\n" in seen


async def test_a_readonly_disk_cannot_be_written(tmp_path: Path) -> None:
    disks = []
    for name, readonly in (("a", True), ("b", False)):
        path = tmp_path / name
        path.write_bytes(bytes(512))
        disks.append(Disk(path=path, readonly=readonly))
    script = "for d in vda vdb; do echo new > /dev/$d; done; sync; echo end; sleep 1000"
    spec = attrs.evolve(await scripted(tmp_path, script), disks=tuple(disks))
    async with QemuEngine().open(spec) as machine:
        await console_until(machine, b"end\r\n")
    assert disks[0].path.read_bytes() == bytes(512)
    assert disks[1].path.read_bytes().startswith(b"new\n")


async def test_memory_and_processors_are_as_asked(tmp_path: Path) -> None:
    spec = await scripted(tmp_path, "echo cpus=$(nproc); head -1 /proc/meminfo; sleep 1000")
    async with QemuEngine().open(attrs.evolve(spec, memory_mib=512, vcpus=2)) as machine:
        seen = await console_until(machine, b" kB\r\n")
    assert b"cpus=2\r\n" in seen
    total = int(seen.partition(b"MemTotal:")[2].split()[0])
    assert 400_000 < total < 512 * 1024


async def test_a_machine_that_cannot_be_made_says_why(
    agent_spec: MachineSpec, tmp_path: Path
) -> None:
    nonsense = tmp_path / "kernel"
    nonsense.write_bytes(b"nonsense" * 100)
    for spec in (
        attrs.evolve(agent_spec, memory_mib=1 << 40),
        attrs.evolve(agent_spec, kernel=nonsense),
        attrs.evolve(agent_spec, initramfs=tmp_path / "missing"),
    ):
        with pytest.raises(VmExited) as caught:
            async with QemuEngine().open(spec):
                raise AssertionError("it was opened")
        assert caught.value.reason == "failed"
        assert "qemu" in caught.value.detail
    with pytest.raises(FileNotFoundError):
        async with QemuEngine().open(
            attrs.evolve(agent_spec, disks=(Disk(path=tmp_path / "missing"),))
        ):
            raise AssertionError("it was opened")


async def test_cancelling_the_start_anywhere_leaves_nothing(agent_spec: MachineSpec) -> None:
    async with QemuEngine().open(agent_spec):
        pass  # what is found once and remembered is found now
    for steps in range(1, 1000):
        before = open_files().keys()
        left = 0
        with trio.CancelScope() as scope, StepCanceller(steps, scope) as canceller:
            async with QemuEngine().open(agent_spec) as machine:
                left = canceller.left
                scope.cancel()
                await machine.wait_exit()
        assert scope.cancelled_caught
        assert open_files().keys() == before
        if left > 0:
            assert steps > 2
            return
    raise AssertionError("the start never came to its end")


_HOST_PROGRAM = """\
import sys, trio
from pathlib import Path
from trio_supermachine.hv.base import MachineSpec
from trio_supermachine.hv.qemu.engine import QemuEngine

async def main():
    spec = MachineSpec(kernel=Path(sys.argv[1]), initramfs=Path(sys.argv[2]))
    async with QemuEngine().open(spec) as machine:
        print(machine.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def _host_program(spec: MachineSpec) -> subprocess.Popen[bytes]:
    assert spec.kernel is not None
    assert spec.initramfs is not None
    return subprocess.Popen(
        [sys.executable, "-c", _HOST_PROGRAM, spec.kernel, spec.initramfs],
        stdout=subprocess.PIPE,
    )


async def test_a_killed_host_program_leaves_no_engine(agent_spec: MachineSpec) -> None:
    with _host_program(agent_spec) as host:
        assert host.stdout is not None
        qemu = os.pidfd_open(int(host.stdout.readline()))
        try:
            host.kill()
            with trio.fail_after(60):
                await trio.lowlevel.wait_readable(qemu)
        finally:
            os.close(qemu)


async def test_a_missing_qemu_is_an_error_that_helps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, agent_spec: MachineSpec
) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_QEMU", str(tmp_path / "qemu"))
    with pytest.raises(AssetNotFound, match="TRIO_SUPERMACHINE_QEMU") as caught:
        async with QemuEngine().open(agent_spec):
            raise AssertionError("it was opened")
    assert caught.value.asset == "qemu"
    with pytest.raises(EngineUnavailable) as unavailable:
        await choose_engine()
    assert unavailable.value.tried.keys() == {"kvm", "qemu"}
    assert "apt-get install qemu-system-x86" in unavailable.value.tried["qemu"]
    monkeypatch.delenv("TRIO_SUPERMACHINE_QEMU")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineUnavailable, match="PATH"):
        await choose_engine("qemu")


async def test_a_program_that_is_no_qemu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_QEMU", "/bin/true")
    report = await QemuEngine().probe()
    assert not report.available
    assert report.remedy is not None
    with pytest.raises(EngineUnavailable):
        await choose_engine("qemu")


async def test_an_engine_is_chosen_without_running_anything_twice() -> None:
    first = await choose_engine()
    assert first.name == "qemu"
    report = await first.probe()
    assert report.available
    assert await first.probe() is report
    with pytest.raises(ValueError, match="no engine 'xen'"):
        await choose_engine("xen")


@pytest.mark.qemu
async def test_an_engine_that_is_killed_while_it_loads_does_not_blame_the_snapshot(
    baked: Image,
) -> None:
    plan = await plan_start(baked, VmConfig())
    async with plan.engine.open(plan.spec) as machine:
        assert isinstance(machine, QemuMachine)
        os.kill(machine.pid, signal.SIGKILL)
        with pytest.raises(VmExited) as caught:
            await machine.resume()
        assert caught.value.reason == "killed"
