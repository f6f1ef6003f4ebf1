"""Bakes of real guests: done once, restored as they were, and failing with a reason."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from trio_supermachine import (
    BakeFailed,
    ConfigError,
    Image,
    NotSupported,
    OciImageBuilder,
    Progress,
    PullPolicy,
    SnapshotResources,
    Vm,
)
from trio_supermachine.api import image_for_command
from trio_supermachine.bake.store import BakeStore
from trio_supermachine.host import files as hostfiles
from trio_supermachine.host.locks import unused
from trio_supermachine.library.prune import prune

from ..support.guests import PATIENCE, VCPUS

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.small_kernel]

BUSYBOX = "builtin:busybox"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own, with the host's kernels."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "kernels").symlink_to(hostfiles.home() / "kernels")
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(home))
    return home


def left(home: Path) -> set[str]:
    """What there is of bakes."""
    return {str(path.relative_to(home)) for path in (home / "bakes").rglob("*") if path.is_file()}


def builder() -> OciImageBuilder:
    """The quickest bake: nothing runs in it, and nothing is waited for."""
    return Image.builder(BUSYBOX).with_cmd([]).with_memory_mib(128).with_vcpus(VCPUS)


class Phases:
    """Progress that remembers its phases."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def __call__(self, step: Progress) -> None:
        self.seen.append(step.phase)


async def output(vm: Vm, script: str) -> str:
    done = await vm.run_process(["sh", "-c", script], capture_stdout=True)
    return done.stdout.decode()


async def count(vm: Vm) -> None:
    """A warm-up that leaves a program behind."""
    loop = "while :; do echo x >>/tmp/count; sleep 0.01; done"
    # When the file is there the program has left the process group, which ends with its shell.
    script = (
        f"setsid sh -c '{loop}' </dev/null >/dev/null 2>&1 & until [ -e /tmp/count ]; do :; done"
    )
    await vm.run_process(["sh", "-c", script])
    await vm.write_file("/tmp/warm", b"warm")


async def test_a_bake_is_done_once_and_restores_what_it_was(home: Path) -> None:
    baking = (
        builder()
        .with_env("GREETING", "hello")
        .with_workdir("/var")
        .with_user("nobody")
        .with_extra_file("/etc/app/conf", b"configured", 0o600)
        .with_warmup(count)
    )
    phases = Phases()
    image = await baking.build(phases)
    assert phases.seen == ["boot", "wait", "warmup", "capture", "publish"]
    phases = Phases()
    again = await baking.build(phases)
    assert phases.seen == []
    assert image.snapshot is not None
    assert again.snapshot is not None
    assert again.snapshot.identity == image.snapshot.identity
    async with again.start() as vm:
        assert vm.started_by == "restore"
        assert await vm.read_file("/tmp/warm") == b"warm"
        assert await vm.read_file("/etc/app/conf") == b"configured"
        assert await output(vm, "echo $GREETING; pwd; id -un") == "hello\n/var\nnobody\n"
        before = int(await output(vm, "wc -l </tmp/count"))
        with trio.fail_after(60):
            while int(await output(vm, "wc -l </tmp/count")) == before:
                pass


async def test_variants_stand_side_by_side_and_a_name_moves() -> None:
    first = await builder().with_name("app").build()
    second = await builder().with_name("app").with_warmup_tag("v2").build()
    assert first.snapshot is not None
    assert second.snapshot is not None
    assert first.snapshot.directory != second.snapshot.directory
    bakes = {bake.names: bake.directory for bake in await BakeStore().list()}
    assert bakes == {("app",): second.snapshot.directory, (): first.snapshot.directory}
    back = await builder().with_name("app").build()
    assert back.snapshot is not None
    names = {bake.directory: bake.names for bake in await BakeStore().list()}
    assert names[first.snapshot.directory] == ("app",)
    assert names[second.snapshot.directory] == ()
    assert [image.name for image in (first, second, back)] == ["app"] * 3


async def test_the_workload_sees_extra_files_and_its_own_configuration_from_its_start() -> None:
    image = await (
        builder()
        .with_entrypoint(["/bin/sh", "/srv/run"])
        .with_cmd(["one", "two"])
        .with_extra_file("/srv/run", b'echo "$@" >/tmp/ran; exec httpd -f -p 8080\n')
        .with_guest_port(8080)
        .build()
    )
    async with image.start() as vm:
        assert vm.started_by == "restore"
        assert await vm.wait_listening() == 8080
        assert await vm.read_file("/tmp/ran") == b"one two\n"
        assert vm.image.guest_port == 8080


async def test_a_damaged_bake_is_made_again(home: Path) -> None:
    image = await builder().build()
    assert image.snapshot is not None
    engine = image.snapshot.metadata.engine.encode()
    metadata = image.snapshot.directory / "metadata.json"
    metadata.write_bytes(metadata.read_bytes().replace(engine, engine[::-1]))
    phases = Phases()
    again = await builder().build(phases)
    assert "boot" in phases.seen
    async with again.start() as vm:
        assert vm.started_by == "restore"


async def test_a_snapshot_restores_by_its_path_wherever_it_was_moved(tmp_path: Path) -> None:
    image = await builder().with_guest_port(80).with_snapshot(SnapshotResources(after_ms=0)).build()
    assert image.snapshot is not None
    moved = image.snapshot.directory.rename(tmp_path / "moved")
    for path in (moved, moved / "restore.snap"):
        found = await Image.from_snapshot(path)
        assert (found.memory_mib, found.vcpus, found.guest_port) == (128, VCPUS, 80)
        assert (found.reference, found.digest) == (BUSYBOX, image.digest)
        assert found.config == image.config
        async with found.start() as vm:
            assert vm.started_by == "restore"


async def test_other_images_bake_side_by_side_and_the_same_one_once(home: Path) -> None:
    warming = trio.Event()
    go_on = trio.Event()
    warmed: list[Vm] = []

    async def wait(vm: Vm) -> None:
        warmed.append(vm)
        warming.set()
        await go_on.wait()

    images = []

    async def build() -> None:
        images.append(await builder().with_warmup(wait).build())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(build)
        await warming.wait()
        nursery.start_soon(build)
        await builder().build()  # another one
        removed = await prune(everything=True)  # what is being made keeps its layers
        assert len(removed.bakes) == 1
        assert not removed.layers
        go_on.set()
    assert len(warmed) == 1
    assert len({image.snapshot.identity for image in images if image.snapshot}) == 1
    async with images[0].start() as vm:
        assert vm.started_by == "restore"


async def test_a_build_waits_while_a_pruner_holds_a_layer() -> None:
    image = await builder().build()
    with unused(image.layers[0]) as free:
        assert free
        with trio.move_on_after(0.3) as scope:
            await builder().build()
        assert scope.cancelled_caught
    await builder().build()


BAKER = """
import os, sys, trio
from trio_supermachine import Image
async def progress(step):
    print(step.phase, flush=True)
async def main():
    image = await Image.builder("builtin:busybox").with_cmd([]).with_memory_mib(128).build(progress)
    print(image.snapshot.identity, flush=True)
trio.run(main)
"""


async def test_two_programs_that_bake_the_same_do_it_once() -> None:
    said: list[list[str]] = []

    async def run() -> None:
        done = await trio.run_process([sys.executable, "-c", BAKER], capture_stdout=True)
        said.append(done.stdout.decode().split())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        nursery.start_soon(run)
    one, other = said
    assert sum(phase == "boot" for phase in one + other) == 1
    assert one[-1] == other[-1]


@pytest.mark.parametrize("phase", ["boot", "wait", "capture", "publish"])
async def test_after_a_kill_at_any_moment_the_next_bake_works(phase: str, home: Path) -> None:
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, stdout=subprocess.PIPE, check=False)
        process: trio.Process = await nursery.start(run, [sys.executable, "-c", BAKER])
        assert process.stdout is not None
        said = b""
        async for chunk in process.stdout:
            said += chunk
            if phase.encode() in said.split():
                process.kill()
    found = await BakeStore().list()
    assert all(bake.problem is None for bake in found)
    image = await builder().build()
    async with image.start() as vm:
        assert vm.started_by == "restore"
    names = {Path(name).name for name in left(home) if not name.endswith(".lock")}
    assert names == {"metadata.json", "restore.snap", "memory.bin", "used"}


@pytest.mark.parametrize("phase", ["boot", "wait", "warmup", "capture"])
async def test_a_cancelled_bake_leaves_nothing(phase: str, home: Path) -> None:
    async def wait(vm: Vm) -> None:
        await trio.lowlevel.checkpoint()

    async def progress(step: Progress) -> None:
        if step.phase == phase:
            scope.cancel()

    with trio.CancelScope() as scope:
        await builder().with_warmup(wait).build(progress)
    assert scope.cancelled_caught
    assert not left(home)


# When to capture


async def test_without_a_port_a_workload_that_goes_on_is_captured_after_a_moment() -> None:
    image = await builder().with_cmd(["sh", "-c", "echo $$ >/tmp/pid; exec sleep 1000"]).build()
    async with image.start() as vm:
        pid = int(await vm.read_file("/tmp/pid"))
        assert await output(vm, f"cat /proc/{pid}/comm") == "sleep\n"


@pytest.mark.parametrize(
    "triggers",
    [
        SnapshotResources(after_ms=1),
        SnapshotResources(at_heartbeat=3, quiesce_ms=10),
        SnapshotResources(at_heartbeat=1, on_listener=True),
    ],
)
async def test_the_first_trigger_counts(triggers: SnapshotResources) -> None:
    baking = builder().with_cmd(["sleep", "1000"]).with_guest_port(99).with_snapshot(triggers)
    assert (await baking.build()).snapshot is not None


async def test_a_workload_that_never_listens_fails_the_bake_and_the_remedy_is_named(
    home: Path,
) -> None:
    baking = builder().with_cmd(["sh", "-c", "echo busy; sleep 1000"]).with_guest_port(80)
    with pytest.raises(BakeFailed, match=r"on a TCP port.*with_trigger_timeout") as caught:
        await baking.with_trigger_timeout(3).build()
    assert "busy" in caught.value.console
    assert not left(home)


async def test_a_workload_that_fails_before_it_listens_fails_the_bake_at_once(home: Path) -> None:
    baking = builder().with_cmd(["sh", "-c", "echo no luck; exit 3"]).with_guest_port(80)
    with pytest.raises(BakeFailed, match="return code 3 before it listened") as caught:
        await baking.build()
    assert "no luck" in caught.value.console
    assert not left(home)


async def test_a_guest_that_ends_in_its_warm_up_fails_the_bake(home: Path) -> None:
    async def power_off(vm: Vm) -> None:
        await vm.run_process(["sh", "-c", "echo so long >/dev/console; poweroff -f"])

    with pytest.raises(BakeFailed, match="ended before it was captured") as caught:
        await builder().with_warmup(power_off).build()
    assert "so long" in caught.value.console
    assert not left(home)


async def test_what_a_warm_up_raises_comes_out_as_it_is(home: Path) -> None:
    async def fail(vm: Vm) -> None:
        await vm.run_process(["false"])

    with pytest.raises(subprocess.CalledProcessError):
        await builder().with_warmup(fail).build()
    assert not left(home)


# What is refused


async def test_a_platform_that_no_guest_here_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="linux/s390x"):
        await builder().with_platform("linux/s390x").build()


WRONG = [
    ("with_name", "a/b"),
    ("with_platform", "linux"),
    ("with_memory_mib", 31),
    ("with_memory_mib", "256"),
    ("with_vcpus", 0),
    ("with_vcpus", True),
    ("with_env", "", "x"),
    ("with_env", "A=B", "x"),
    ("with_env", "A", "\0"),
    ("with_env", "A", 5),
    ("with_env", "A", "\ud800"),
    ("with_cmd", "sh -c true"),
    ("with_cmd", ["a", 5]),
    ("with_cmd", ["\0"]),
    ("with_entrypoint", "sh"),
    ("with_user", 5),
    ("with_workdir", "relative"),
    ("with_guest_port", 0),
    ("with_guest_port", 65536),
    ("with_extra_file", "relative", b""),
    ("with_extra_file", "/a", "text"),
    ("with_pull_policy", "always"),
    ("with_engine", "xen"),
    ("with_warmup", 5),
    ("with_warmup_tag", 5),
    ("with_snapshot", None),
    ("with_snapshot", SnapshotResources(out_path="/tmp/x")),
    ("with_trigger_timeout", 0),
    ("with_trigger_timeout", float("nan")),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong[0]} {wrong[1]!a:.20}")
def test_wrong_values_are_refused_where_they_are_written(wrong: tuple[object, ...]) -> None:
    method, *arguments = wrong
    with pytest.raises(ConfigError):
        getattr(builder(), str(method))(*arguments)


def test_a_builder_never_changes() -> None:
    start = builder()
    before = repr(start), start
    changed = start.with_env("A", "b").with_vcpus(2).with_pull_policy(PullPolicy.NEVER)
    assert (repr(start), start) == before
    assert changed != start
    assert start.with_env("A", "b").with_vcpus(2).with_pull_policy(PullPolicy.NEVER) == changed


def workload_image() -> OciImageBuilder:
    return Image.builder(BUSYBOX).with_cmd(["touch", "/mark"]).with_memory_mib(128)


async def test_a_snapshot_from_before_the_workload_starts_it_unless_told_otherwise() -> None:
    before = await image_for_command(workload_image().with_vcpus(VCPUS))
    assert before.snapshot is not None
    image = await Image.from_snapshot(before.snapshot.directory)
    async with Vm.start(image) as vm:
        assert vm.started_by == "restore"
        assert await vm.wait_workload() == 0
        assert await vm.read_file("/mark") == b""
    async with Vm.start(image, workload=False) as vm:
        assert vm.started_by == "restore"
        with pytest.raises(ProcessLookupError):
            await vm.wait_workload()
        with pytest.raises(FileNotFoundError):
            await vm.read_file("/mark")


async def test_a_bake_begins_anew_if_its_first_snapshot_cannot_be_restored_here() -> None:
    builder = workload_image().with_vcpus(VCPUS)
    before = await image_for_command(builder)
    assert before.snapshot is not None
    file = before.snapshot.directory / "metadata.json"
    metadata = before.snapshot.metadata
    foreign = attrs.evolve(metadata, host={**metadata.host, "cpu": "another"})
    file.write_bytes(foreign.to_bytes())
    phases = Phases()
    image = await builder.build(phases)
    async with Vm.start(image) as vm:
        assert await vm.read_file("/mark") == b""
    again = await image_for_command(builder)
    assert again.snapshot is not None
    assert again.snapshot.metadata.host == metadata.host


async def test_a_command_does_not_wait_for_the_workload_of_somebody_else() -> None:
    slow = workload_image().with_vcpus(VCPUS).with_snapshot(SnapshotResources(after_ms=3_600_000))
    slow = slow.with_trigger_timeout(7200)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow.build)
            image = await image_for_command(slow)
            assert image.snapshot is not None
            nursery.cancel_scope.cancel()
