"""What a snapshot captures, what goes on while it is taken, and what is new in a restored VM."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Literal

import attrs
import pytest
import trio

from trio_supermachine import (
    AssetPaths,
    Image,
    SnapshotIncompatible,
    SnapshotInvalid,
    Vm,
    VmConfig,
    VmExited,
)
from trio_supermachine.snapshots import verify_snapshot

from ..support.echo import echoing
from ..support.guests import CLOCK, VCPUS, read_until
from ..support.processes import engines

pytestmark = [
    pytest.mark.vm,
    pytest.mark.lab,
    pytest.mark.lab_two_vcpus,
    pytest.mark.small_kernel,
]

COUNTER = "i=0; while :; do i=$((i+1)); echo $i >/run/count; usleep 5000; done"


async def output(vm: Vm, script: str) -> str:
    done = await vm.run_process(["sh", "-c", script], capture_stdout=True)
    return done.stdout.decode().strip()


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


async def detach(vm: Vm, script: str) -> None:
    """Run ``script`` in a session of its own, so that it outlives its exec."""
    await output(vm, f"setsid sh -c '({script}) </dev/null >/dev/null 2>&1 &'; true")


async def start_counting(vm: Vm) -> None:
    await detach(vm, COUNTER)
    await count_beyond(vm, 1)


async def count_beyond(vm: Vm, number: int) -> int:
    while True:
        said = await output(vm, "cat /run/count 2>/dev/null || true")
        if said.isdigit() and int(said) > number:
            return int(said)


async def drawn_lines(vm: Vm, count: int) -> list[bytes]:
    while True:
        with suppress(FileNotFoundError):
            lines = (await vm.read_file("/run/drawn")).splitlines()
            if len(lines) >= count:
                return lines


async def test_processes_and_files_go_on_in_the_copy_and_in_the_source(
    vm: Vm, tmp_path: Path
) -> None:
    await vm.write_file("/root/before", b"kept")
    await start_counting(vm)
    image = await vm.snapshot(tmp_path / "snap")
    after = await count_beyond(vm, 1)
    await vm.write_file("/root/after", b"not in the copy")
    async with Vm.start(image) as copy:
        assert copy.started_by == "restore"
        assert await copy.read_file("/root/before") == b"kept"
        with pytest.raises(FileNotFoundError):
            await copy.read_file("/root/after")
        began = await count_beyond(copy, 1)
        await count_beyond(copy, began)
    await count_beyond(vm, after)


async def test_streams_go_on_through_a_capture_and_no_byte_is_lost(vm: Vm, tmp_path: Path) -> None:
    async with echoing(vm, 3_000_000, 50_000):
        for number in range(3):
            await vm.snapshot(tmp_path / str(number))


async def test_an_exec_that_was_open_is_ended_in_the_copy(vm: Vm, tmp_path: Path) -> None:
    async with vm.exec(["sleep", "7654"]) as child:
        image = await vm.snapshot(tmp_path / "snap")
        async with Vm.start(image) as copy:
            assert "7654" not in await output(copy, "ps | grep -v grep | grep sleep || true")
        assert "7654" in await output(vm, "ps")
        child.kill()


async def test_copies_are_machines_of_their_own(vm: Vm, tmp_path: Path) -> None:
    ask = (
        "head -c16 /dev/urandom | od -An -tx8; cat /proc/sys/kernel/random/uuid"
        " /etc/machine-id /proc/sys/kernel/random/boot_id"
    )
    image = await vm.snapshot(tmp_path / "snap")
    answers = [(await output(vm, ask)).splitlines()]

    async def one() -> None:
        async with Vm.start(image) as copy:
            answers.append((await output(copy, ask)).splitlines())

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one)
    for kind in zip(*answers, strict=True):
        assert len(set(kind)) == len(answers), kind


async def test_programs_that_ran_at_the_capture_share_no_random_numbers(
    vm: Vm, tmp_path: Path
) -> None:
    draw = "while :; do cat /proc/sys/kernel/random/uuid >>/run/drawn; done"
    await detach(vm, draw)
    await drawn_lines(vm, 3)
    image = await vm.snapshot(tmp_path / "snap")
    drawn = []
    for _ in range(2):
        async with Vm.start(image) as copy:
            before = len(await drawn_lines(copy, 3))
            drawn.append(await drawn_lines(copy, before + 5))
    common = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(*drawn, strict=False))]
    assert not set(drawn[0][len(common) :]) & set(drawn[1])
    # What both have was drawn before the capture: the source has it, too.
    source = await drawn_lines(vm, len(common))
    assert source[: len(common)] == common


async def test_the_clock_of_a_copy_is_right(vm: Vm, tmp_path: Path) -> None:
    image = await vm.snapshot(tmp_path / "snap")
    await output(vm, "date -s @1000000000")
    wrong = await vm.snapshot(tmp_path / "wrong")
    for one in (image, wrong):
        async with Vm.start(one) as copy:
            before = time.time()
            assert before - CLOCK <= int(await output(copy, "date +%s")) <= time.time() + 1
    assert time.time() - CLOCK <= int(await output(vm, "date +%s")) <= time.time() + 1


async def test_a_copy_gets_the_hostname_that_is_asked_for(vm: Vm, tmp_path: Path) -> None:
    image = await vm.snapshot(tmp_path / "snap")
    async with Vm.start(image, VmConfig(hostname="second")) as copy:
        assert await output(copy, "hostname; cat /etc/hostname") == "second\nsecond"
    async with Vm.start(image) as copy:
        assert await output(copy, "hostname") == "supermachine"


async def test_a_copy_changes_nothing_in_its_snapshot(vm: Vm, tmp_path: Path) -> None:
    image = await vm.snapshot(tmp_path / "snap")
    async with Vm.start(image) as copy:
        await output(copy, "head -c 30000000 /dev/urandom >/root/noise; sync")
    await verify_snapshot(tmp_path / "snap")


async def test_diffs_make_a_chain_and_store_only_what_changed(vm: Vm, tmp_path: Path) -> None:
    image = await vm.snapshot(tmp_path / "full")
    for name in ("first", "second"):
        async with Vm.start(image) as copy:
            await copy.write_file(f"/root/{name}", name.encode())
            image = await copy.snapshot_diff(tmp_path / name, image)
            await copy.ping()
    assert image.snapshot is not None
    assert image.snapshot.depth == 2
    async with Vm.start(image) as copy:
        assert await copy.read_file("/root/first") == b"first"
        assert await copy.read_file("/root/second") == b"second"
    full = (tmp_path / "full/memory.bin").stat().st_blocks * 512
    for name in ("first", "second"):
        assert (tmp_path / name / "memory.diff").stat().st_size < full / 5


async def test_a_moved_chain_still_restores(vm: Vm, tmp_path: Path) -> None:
    full = await vm.snapshot(tmp_path / "a/full")
    await vm.write_file("/root/x", b"x")
    await vm.snapshot_diff(tmp_path / "a/diff", full)
    (tmp_path / "a").rename(tmp_path / "b")
    async with Vm.start(await Image.from_snapshot(tmp_path / "b/diff/restore.snap")) as copy:
        assert await copy.read_file("/root/x") == b"x"


async def test_a_diff_may_be_made_on_any_snapshot_of_a_guest_of_that_size(
    vm: Vm, tmp_path: Path
) -> None:
    await vm.snapshot(tmp_path / "one")
    await output(vm, "head -c 5000000 /dev/urandom >/root/noise; rm /root/noise; echo hi >/root/f")
    image = await vm.snapshot_diff(tmp_path / "two", tmp_path / "one")
    async with Vm.start(image) as copy:
        assert await output(copy, "cat /root/f; ls /root") == "hi\nf"


async def test_other_hardware_boots_and_require_restore_refuses(vm: Vm, tmp_path: Path) -> None:
    image = await vm.snapshot(tmp_path / "snap")
    async with Vm.start(image, VmConfig(memory_mib=300)) as booted:
        assert booted.started_by == "boot"
    async with Vm.start(image, VmConfig(require_restore=True, memory_mib=256, vcpus=VCPUS)) as copy:
        assert copy.started_by == "restore"
    with pytest.raises(SnapshotIncompatible, match="300 MiB"):
        async with Vm.start(image, VmConfig(require_restore=True, memory_mib=300)):
            pass
    with pytest.raises(SnapshotInvalid, match="bake"):
        async with Vm.start(attrs.evolve(image, snapshot=None), VmConfig(require_restore=True)):
            pass


async def test_another_engine_or_host_is_refused_with_what_differs(vm: Vm, tmp_path: Path) -> None:
    image = await vm.snapshot(tmp_path / "snap")
    other: Literal["kvm", "qemu"] = "kvm" if vm.engine == "qemu" else "qemu"
    with pytest.raises(SnapshotIncompatible, match=f"'{vm.engine}', not '{other}'"):
        async with Vm.start(image, VmConfig(engine=other)):
            pass
    assert image.snapshot is not None
    fact, *_ = image.snapshot.metadata.host
    host = {**image.snapshot.metadata.host, fact: "1.0"}
    metadata = attrs.evolve(image.snapshot.metadata, host=host)
    foreign = attrs.evolve(image, snapshot=attrs.evolve(image.snapshot, metadata=metadata))
    with pytest.raises(SnapshotIncompatible, match=rf"{fact} '1\.0'"):
        async with Vm.start(foreign):
            pass


async def test_device_state_that_the_engine_cannot_load_is_a_typed_error(
    vm: Vm, tmp_path: Path
) -> None:
    image = await vm.snapshot(tmp_path / "snap")
    state = tmp_path / "snap/restore.snap"
    state.write_bytes(state.read_bytes()[:3000])
    with pytest.raises(SnapshotInvalid, match=r"restore\.snap.*cannot load"):
        async with Vm.start(image):
            pass


async def test_what_is_in_the_way_is_refused_and_kept(vm: Vm, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(FileExistsError):
            await vm.snapshot(tmp_path / name)
    (tmp_path / "empty").mkdir()
    await vm.snapshot(tmp_path / "empty")
    assert (tmp_path / "file").read_text() == (tmp_path / "full/file").read_text() == "mine"


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file that this process writes can grow beyond ``size`` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [1 << 10, 40 << 20])
async def test_a_full_disk_is_an_error_and_the_vm_goes_on(
    vm: Vm, tmp_path: Path, size: int
) -> None:
    await start_counting(vm)
    with full_disk(size), pytest.raises(OSError, match="File too large"):
        await vm.snapshot(tmp_path / "snap")
    assert names(tmp_path) == []
    await count_beyond(vm, await count_beyond(vm, 1))
    await vm.snapshot(tmp_path / "snap")


async def test_a_capture_cancelled_anywhere_leaves_nothing_and_the_vm_goes_on(
    vm: Vm, tmp_path: Path
) -> None:
    rng = random.Random(3)
    await start_counting(vm)
    async with vm.exec(["cat"]) as child:
        assert child.stdin is not None
        for number in range(30):
            with trio.move_on_after(rng.uniform(0, 0.3)):
                await vm.snapshot(tmp_path / f"snap{number}")
                continue
            assert not {f"snap{number}"} & set(names(tmp_path))
            assert not [name for name in names(tmp_path) if name.startswith(".")]
            await child.stdin.send_all(b"%d\n" % number)
            assert await read_until(child.stdout, b"\n") == b"%d\n" % number
    await count_beyond(vm, await count_beyond(vm, 1))


@pytest.mark.qemu
async def test_a_vm_that_dies_in_a_capture_surfaces_as_vm_exited(
    busybox: Image, tmp_path: Path
) -> None:
    async def kill(pid: int) -> None:
        while not [name for name in names(tmp_path) if name.startswith(".")]:
            await trio.lowlevel.checkpoint()
        os.kill(pid, signal.SIGKILL)

    with pytest.raises(VmExited):
        async with Vm.start(busybox) as vm, trio.open_nursery() as nursery:
            (pid,) = engines()
            nursery.start_soon(kill, pid)
            while True:
                with suppress(FileExistsError):
                    await vm.snapshot(tmp_path / "snap")
    assert names(tmp_path) in ([], ["snap"])


async def test_a_capture_waits_while_the_vm_is_paused(vm: Vm, tmp_path: Path) -> None:
    await vm.pause()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vm.snapshot, tmp_path / "snap")
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert not (tmp_path / "snap").exists()
        await vm.resume()
    async with Vm.start(await Image.from_snapshot(tmp_path / "snap")) as copy:
        await copy.ping()


async def test_an_explicit_kernel_boots(vm: Vm, tmp_path: Path) -> None:
    image = await vm.snapshot(tmp_path / "snap")
    assets = AssetPaths(kernel=Path("/nonexistent"))
    with pytest.raises(Exception, match="/nonexistent"):
        async with Vm.start(image, VmConfig(assets=assets)):
            pass


async def test_the_guests_first_listener_is_awaited(vm: Vm) -> None:
    with trio.move_on_after(0.1):
        raise AssertionError(await vm.wait_listening())
    async with vm.exec(["nc", "-l", "-p", "8123"], stdin=False) as child:
        assert await vm.wait_listening() == 8123
        child.kill()
