"""How VMs start, end and fail, and what everybody who waits is told."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from trio_supermachine import (
    AssetPaths,
    ConfigError,
    Image,
    ImageNotFound,
    NotSupported,
    SnapshotInvalid,
    StartTimeout,
    Vm,
    VmConfig,
    VmExited,
    VolumeSpec,
)

from ..pure.test_x86_boot import elf_kernel
from ..support.guests import CLOCK, PATIENCE, guest_processes, read_until
from ..support.processes import engines

pytestmark = [pytest.mark.vm, pytest.mark.lab, pytest.mark.small_kernel]


def engine_pid() -> int:
    (pid,) = engines()
    return pid


async def test_a_vm_knows_what_it_is(busybox: Image, baked: Image, engine_name: str) -> None:
    for image, started_by in ((busybox, "boot"), (baked, "restore")):
        async with Vm.start(image) as vm:
            assert (vm.engine, vm.started_by) == (engine_name, started_by)
            assert "builtin:busybox" in repr(vm)
            done = await vm.run_process(["sh", "-c", "hostname; id -u; pwd"], capture_stdout=True)
            assert done.stdout.decode().split() == ["supermachine", "0", "/"]


async def test_the_clock_is_right_after_a_boot(vm: Vm) -> None:
    before = time.time()
    done = await vm.run_process(["date", "+%s"], capture_stdout=True)
    assert before - CLOCK <= int(done.stdout) <= time.time() + 1


@pytest.mark.several_vcpus
async def test_memory_cpus_and_hostname_are_as_configured(busybox: Image) -> None:
    config = VmConfig(memory_mib=384, vcpus=2, hostname="box")
    async with Vm.start(busybox, config) as vm:
        done = await vm.run_process(
            ["sh", "-c", "hostname; nproc; grep MemTotal /proc/meminfo"], capture_stdout=True
        )
    name, cpus, _, memory, _ = done.stdout.decode().split()
    assert (name, cpus) == ("box", "2")
    assert 300_000 < int(memory) < 384 * 1024


@pytest.mark.parametrize("how", ["poweroff -f", "reboot -f", "echo c >/proc/sysrq-trigger"])
async def test_a_guest_that_ends_surfaces_as_a_bare_vm_exited(baked: Image, how: str) -> None:
    with pytest.raises(VmExited) as caught:
        async with Vm.start(baked) as vm, trio.open_nursery() as nursery:
            nursery.start_soon(vm.run_process, ["sleep", "1000"])
            await vm.run_process(["sh", "-c", f"{how}; sleep 1000"], check=False)
            await trio.sleep_forever()
    assert caught.value.reason in ("shutdown", "reset")
    if "sysrq" in how:
        assert "Kernel panic" in caught.value.console


@pytest.mark.qemu
async def test_a_killed_engine_is_told_to_every_pending_call(baked: Image) -> None:
    told: list[str] = []

    async def expect_exit(name: str, vm: Vm, started: trio.Event) -> None:
        with pytest.raises(VmExited):
            if name == "run":
                started.set()
                await vm.run_process(["sleep", "1000"])
            elif name == "receive":
                async with vm.exec(["sleep", "1000"]) as child:
                    started.set()
                    await child.stdout.receive_some()
            elif name == "wait":
                async with vm.exec(["sleep", "1000"]) as child:
                    started.set()
                    await child.wait()
            elif name == "workload":
                started.set()
                await vm.wait_workload()
        told.append(name)

    names = ["run", "receive", "wait"]
    async with trio.open_nursery() as outside:
        with pytest.raises(VmExited) as caught:
            async with Vm.start(baked) as vm:
                for name in names:
                    started = trio.Event()
                    outside.start_soon(expect_exit, name, vm, started)
                    await started.wait()
                os.kill(engine_pid(), signal.SIGKILL)
                with trio.fail_after(PATIENCE):
                    await trio.sleep_forever()
        assert caught.value.reason == "killed"
    assert sorted(told) == sorted(names)
    with pytest.raises(VmExited):
        await vm.run_process(["true"])


async def test_the_bodys_own_error_comes_out_as_itself(baked: Image) -> None:
    with pytest.raises(KeyError) as caught:
        async with Vm.start(baked):
            raise KeyError("mine")
    assert caught.value.__context__ is None


async def test_stop_is_orderly_and_keeps_the_block_going(baked: Image) -> None:
    async with Vm.start(baked) as vm:
        script = "trap 'echo bye >/dev/console; exit' TERM; echo up; while :; do sleep 0.1; done"
        with suppress(VmExited):  # unless its end is told before that of the VM
            async with vm.exec(["sh", "-c", script]) as child:
                await read_until(child.stdout, b"up\n")
                await vm.stop()
                assert "exited (shutdown)" in repr(vm)  # from here on nobody takes it for alive
        assert b"bye" in vm.console.tail()
        with pytest.raises(VmExited) as caught:
            await vm.run_process(["true"])
        assert caught.value.reason == "shutdown"


async def test_a_guest_whose_agent_is_stopped_is_killed_at_the_end_of_the_grace(
    baked: Image,
) -> None:
    async with Vm.start(baked) as vm:
        async with trio.open_nursery() as nursery:
            # The agent is the parent of what it runs.
            nursery.start_soon(vm.run_process, ["sh", "-c", "kill -STOP $PPID"])
            silent = False
            while not silent:
                with trio.move_on_after(2) as scope:
                    await vm.ping()
                silent = scope.cancelled_caught
            nursery.cancel_scope.cancel()
        await vm.stop(grace=0.2)
        with pytest.raises(VmExited) as caught:
            await vm.run_process(["true"])
        assert caught.value.reason == "stopped"


async def test_a_call_that_waits_for_a_paused_guest_hears_of_its_end(baked: Image) -> None:
    async with Vm.start(baked) as vm:
        await vm.pause()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def call() -> None:
                with pytest.raises(VmExited):
                    await vm.run_process(["true"])

            await trio.testing.wait_all_tasks_blocked(0.1)
            await vm.stop(0)


async def test_a_pause_waits_for_a_capture_whose_programs_then_go_on(
    vm: Vm, tmp_path: Path
) -> None:
    async with vm.exec(["sh", "-c", "while read word; do echo $word; done"], stdin=True) as child:
        assert child.stdin is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.snapshot, tmp_path / "snap")
            await trio.testing.wait_all_tasks_blocked()
            await vm.pause()
            assert (tmp_path / "snap").exists()
        await vm.resume()
        await child.stdin.send_all(b"on\n")
        await read_until(child.stdout, b"on\n")


async def test_a_paused_guest_stands_still_and_its_clock_is_right_afterwards(
    vm: Vm, tmp_path: Path
) -> None:
    await vm.pause()
    await vm.pause()
    paused = trio.current_time()
    calls: list[Callable[[], Awaitable[object]]] = [
        vm.ping,
        partial(vm.write_file, "/tmp/said", b""),
        partial(vm.run_process, ["touch", "/tmp/said"]),
        partial(vm.snapshot, tmp_path / "snap"),
    ]
    for call in calls:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await trio.testing.wait_all_tasks_blocked(0.1)
                scope.cancel()
        assert scope.cancelled_caught
    await trio.sleep_until(paused + CLOCK + 2)  # what its clock would be late by
    await vm.resume()
    await vm.resume()
    # The guest has not heard of a call that was given up.
    with pytest.raises(FileNotFoundError):
        await vm.read_file("/tmp/said")
    before = time.time()
    done = await vm.run_process(["date", "+%s"], capture_stdout=True)
    assert before - CLOCK <= int(done.stdout) <= time.time() + 1


async def test_the_workload_runs_by_itself_and_can_be_signalled(busybox: Image) -> None:
    script = "echo work; trap 'exit 5' USR1; while :; do sleep 0.05; done"
    image = workload_image(busybox, "sh", "-c", script)
    async with Vm.start(image) as vm:
        said = b""
        async for chunk in vm.console:
            said += chunk
            if b"work\r\n" in said:
                break
        pid = int(await vm.read_file("/run/supermachine-workload.pid"))
        await vm.run_process(["kill", "-0", str(pid)])
        await vm.workload_signal(signal.SIGUSR1)
        assert await vm.wait_workload() == 5
        with pytest.raises(ProcessLookupError):
            await vm.workload_signal(signal.SIGUSR1)
        await vm.run_process(["true"])
    async with Vm.start(image, workload=False) as vm:
        with pytest.raises(ProcessLookupError):
            await vm.wait_workload()


async def test_without_its_workload_a_copy_has_none_of_the_programs_that_ran(
    busybox: Image, tmp_path: Path
) -> None:
    script = "setsid sleep 1000 & while :; do echo >>/ticks; sleep 0.01; done"
    image = workload_image(busybox, "sh", "-c", script)
    async with Vm.start(image) as vm:
        await vm.run_process(["sh", "-c", "until [ -s /ticks ]; do sleep 0.01; done"])
        copied = await vm.snapshot(tmp_path / "copied")
        ticks = len(await vm.read_file("/ticks"))
    async with Vm.start(copied, workload=False) as copy:
        assert copy.started_by == "restore"
        assert await guest_processes(copy, "sleep") == []
        # It has not run since the capture, whatever it did before that.
        assert len(await copy.read_file("/ticks")) <= ticks
        with pytest.raises(ProcessLookupError):
            await copy.workload_signal(signal.SIGKILL)
        with pytest.raises(ProcessLookupError):
            await copy.wait_workload()
        again = await copy.snapshot(tmp_path / "again")
    async with Vm.start(again) as vm:
        await vm.run_process(["true"])


def workload_image(image: Image, *cmd: str) -> Image:
    """The image with another command."""
    return attrs.evolve(image, config=attrs.evolve(image.config, cmd=cmd))


async def test_a_workload_that_cannot_start_says_127(busybox: Image) -> None:
    image = workload_image(busybox, "no-such-program")
    async with Vm.start(image) as vm:
        assert await vm.wait_workload() == 127
        assert b"no-such-program" in vm.console.tail()


async def test_a_guest_that_hangs_at_boot_is_a_start_timeout_with_its_console(
    busybox: Image,
) -> None:
    with pytest.raises(StartTimeout) as caught:
        async with Vm.start(busybox, VmConfig(start_timeout=0.1)):
            pytest.fail("entered")
    assert caught.value.seconds == 0.1


async def test_a_guest_that_says_nothing_is_explained(
    busybox: Image, tmp_path: Path, engine_name: str
) -> None:
    halt = b"\xfa\xf4\xeb\xfd"  # cli; hlt; jmp to the hlt
    code = bytes(0x10) + halt + b"Linux version 6.66-silent "
    kernel = tmp_path / "kernel"
    kernel.write_bytes(elf_kernel(segments=((0x100000, code, len(code)),)))
    config = VmConfig(assets=AssetPaths(kernel=kernel), start_timeout=2, memory_mib=64)
    with pytest.raises(StartTimeout, match="its console is empty") as caught:
        async with Vm.start(busybox, config):
            pytest.fail("entered")
    assert caught.value.console == ""
    detail = caught.value.detail
    assert detail in str(caught.value)
    for word in ("6.66-silent", "initramfs-", "64 MiB", "doctor", "AssetPaths"):
        assert word in detail
    if engine_name == "qemu":
        assert re.search(r"QEMU \d+\.\d+ \(/.*\), .*firmware /.*qboot.rom", detail)


async def test_a_memory_that_the_kernel_does_not_fit_in_is_refused(
    busybox: Image, tmp_path: Path
) -> None:
    code = bytes(0x20) + b"Linux version 6.66-large "
    kernel = tmp_path / "kernel"
    kernel.write_bytes(elf_kernel(segments=((0x100000, code, 40 << 20),)))
    config = VmConfig(assets=AssetPaths(kernel=kernel), memory_mib=40)
    with pytest.raises(ConfigError, match="40 MiB of memory are too little for this kernel"):
        async with Vm.start(busybox, config):
            pytest.fail("entered")


async def test_a_guest_that_panics_at_boot_is_vm_exited_with_its_console(
    busybox: Image, tmp_path: Path
) -> None:
    empty = tmp_path / "initramfs"
    empty.write_bytes(b"0707010000000000000000" + b"0" * 88)
    with pytest.raises(VmExited) as caught:
        async with Vm.start(busybox, VmConfig(assets=AssetPaths(initramfs=empty))):
            pytest.fail("entered")
    assert "panic" in caught.value.console


async def test_files_that_were_removed_meanwhile_are_named(
    busybox: Image, vm: Vm, tmp_path: Path
) -> None:
    layer = tmp_path / "layer"
    with pytest.raises(ImageNotFound, match=r"layer was removed; prepare"):
        async with Vm.start(attrs.evolve(busybox, layers=(layer,))):
            pytest.fail("entered")
    image = await vm.snapshot(tmp_path / "snap")
    (tmp_path / "snap/memory.bin").unlink()
    with pytest.raises(SnapshotInvalid, match=r"memory\.bin: it was removed; bake"):
        async with Vm.start(image):
            pytest.fail("entered")


async def test_what_is_not_built_is_refused_before_any_work(busybox: Image) -> None:
    for config, feature in (
        (VmConfig(balloon=True), "balloon"),
        (VmConfig(volumes=(VolumeSpec("/tmp/x", "/x"),)), "volumes"),
    ):
        with pytest.raises(NotSupported) as caught:
            async with Vm.start(busybox, config):
                pytest.fail("entered")
        assert caught.value.feature == feature


async def test_four_vms_at_once(baked: Image) -> None:
    async def one(number: int) -> None:
        async with Vm.start(baked) as vm:
            done = await vm.run_process(["echo", str(number)], capture_stdout=True)
            assert done.stdout == b"%d\n" % number

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(one, number)


async def test_an_idle_vm_does_not_wake_trios_thread(vm: Vm) -> None:
    await vm.run_process(["true"])
    with trio.move_on_after(3):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        await trio.sleep_forever()
    # A loop that polls at 10 Hz would have slept 30 times.
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before < 10
