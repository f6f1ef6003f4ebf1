"""Pools of real VMs: warm, fresh, replaced when they die, and gone with their block."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from trio_supermachine import (
    AcquireTimeout,
    AdmissionRefused,
    ConfigError,
    Image,
    ImageConfig,
    Pool,
    PooledVm,
    Vm,
    VmConfig,
    VmExited,
    memory_admission,
)
from trio_supermachine.api import unbaked_image

from ..support.guests import PATIENCE
from ..support.processes import engines, machines

pytestmark = [pytest.mark.lab, pytest.mark.small_kernel]


@pytest.fixture
def image() -> Image:
    """An image that is never started."""
    return Image(reference="none", config=ImageConfig(), layers=(), digest="sha256:0")


@pytest.fixture
def admission() -> Iterator[None]:
    """Put the process's limit back, and see that nothing is held."""
    limit = memory_admission.limit
    yield
    memory_admission.limit = limit
    assert memory_admission.statistics().holders == 0


async def until(pool: Pool, **wanted: int) -> None:
    """Wait until the pool's numbers are as wanted."""
    with trio.fail_after(PATIENCE):
        while any(getattr(pool.stats(), name) != value for name, value in wanted.items()):
            await trio.lowlevel.checkpoint()


# What needs no VM


@pytest.mark.parametrize("bad", [-1, True, 1.5, math.nan, "1", None])
def test_a_bad_number_is_refused_where_it_is_written(image: Image, bad: object) -> None:
    builder = image.pool()
    for set_ in (builder.min, builder.max):
        with pytest.raises(ConfigError):
            set_(bad)  # type: ignore[arg-type]
    for set_time in (builder.idle_timeout, builder.acquire_timeout):
        with pytest.raises(ConfigError):
            set_time(math.nan if bad == 1.5 else bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        builder.restore_on_release(bad if bad is not True else 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        builder.config(bad)  # type: ignore[arg-type]


def test_a_max_of_zero_and_a_min_above_max_are_refused(image: Image) -> None:
    with pytest.raises(ConfigError):
        image.pool().max(0)
    with pytest.raises(ConfigError, match="min of 3 is above its max of 2"):
        image.pool().min(3).max(2).build()


def test_a_builder_is_immutable(image: Image) -> None:
    first = image.pool()
    assert first.min(1) is not first
    assert first == image.pool()
    assert first.min(1).max(2) == first.max(2).min(1)


async def test_the_defaults_are_as_documented(image: Image) -> None:
    async with image.pool().build() as pool:
        stats = pool.stats()
        assert (stats.min, stats.max, stats.alive) == (0, os.cpu_count(), 0)
        with pytest.raises(ConfigError):
            pool.resize(min=3, max=2)
        pool.resize(max=5)
        assert pool.stats().max == 5
        vm: Any = pool.acquire()
        with pytest.raises(TypeError, match=r"write 'async with pool\.acquire\(\) as vm:'"):
            await vm
    with pytest.raises(trio.ClosedResourceError):
        async with pool.acquire():
            pytest.fail("acquired")


async def test_a_pool_that_can_never_be_admitted_is_refused_before_a_vm_starts(
    image: Image, admission: None
) -> None:
    memory_admission.limit = 1000
    with pytest.raises(AdmissionRefused) as caught:
        async with image.pool().min(3).max(9).config(VmConfig(memory_mib=400)).build():
            pytest.fail("entered")
    assert (caught.value.requested_mib, caught.value.limit_mib) == (1200, 1000)
    large = attrs.evolve(image, memory_mib=600)
    with pytest.raises(AdmissionRefused):
        async with large.pool().min(2).max(2).build():
            pytest.fail("entered")
    async with large.pool().min(0).max(2).build() as pool:
        with pytest.raises(AdmissionRefused):
            pool.resize(min=2)


# What needs VMs


@pytest.mark.vm
async def test_each_acquire_gives_a_warm_fresh_vm_with_all_of_its_api(baked: Image) -> None:
    seen = set()
    async with baked.pool().min(1).max(2).build() as pool:
        for _ in range(3):
            async with pool.acquire() as vm:
                assert isinstance(vm, PooledVm)
                assert isinstance(vm, Vm)
                assert (vm.reused, vm.started_by) == (False, "restore")
                done = await vm.run_process(["ls", "/tmp"], capture_stdout=True)
                assert done.stdout == b""
                await vm.write_file("/tmp/mine", b"x")
                assert await vm.read_file("/tmp/mine") == b"x"
                async with vm.exec(["cat"]) as child:
                    assert child.stdin is not None
                    await child.stdin.send_all(b"through")
                    await child.stdin.aclose()
                    assert await child.stdout.receive_some() == b"through"
                seen.add(await vm.read_file("/etc/machine-id"))
                await until(pool, idle=1)
        assert pool.stats().acquired_total == 3
        assert pool.stats().reused_total == 0
    assert len(seen) == 3
    assert not machines()


@pytest.mark.vm
async def test_a_kept_vm_is_handed_out_again_and_marked(baked: Image) -> None:
    async with baked.pool().max(1).restore_on_release(False).build() as pool:
        async with pool.acquire() as first:
            await first.write_file("/tmp/left", b"here")
            assert not first.reused
        async with pool.acquire() as second:
            assert await second.read_file("/tmp/left") == b"here"
            assert (second.reused, first.reused) == (True, False)
            await second.stop(0)
        async with pool.acquire() as third:  # one that was stopped is not kept
            assert not third.reused
            await third.run_process(["true"])
            with trio.CancelScope() as scope:
                scope.cancel()
                await third.stop()
        async with pool.acquire() as fourth:  # nor one that is about to end
            assert not fourth.reused
            await fourth.run_process(["true"])


@pytest.mark.vm
@pytest.mark.qemu
async def test_a_killed_idle_vm_is_replaced(baked: Image) -> None:
    async with baked.pool().min(1).max(2).build() as pool:
        (pid,) = engines()
        os.kill(pid, signal.SIGKILL)
        await until(pool, died_total=1, idle=1)
        assert isinstance(pool.stats().last_error, VmExited)
        assert pid not in engines()
        async with pool.acquire() as vm:
            await vm.run_process(["true"])


@pytest.mark.vm
@pytest.mark.parametrize("how", ["poweroff", "kill"])
async def test_a_vm_that_dies_in_use_fails_its_acquirer_alone(baked: Image, how: str) -> None:
    async with baked.pool().min(2).max(3).build() as pool:
        async with pool.acquire() as other:
            await until(pool, idle=2)
            with pytest.raises(VmExited):
                async with pool.acquire() as vm, trio.open_nursery() as nursery:
                    if how == "kill":
                        vm._running.client.machine.kill()
                    else:
                        nursery.start_soon(vm.run_process, ["sleep", "1000"])
                        await vm.run_process(["poweroff", "-f"], check=False)
                    await trio.sleep_forever()
            await other.run_process(["true"])
        await until(pool, idle=2)


@pytest.mark.vm
async def test_an_image_gives_one_vm_without_a_pool(baked: Image) -> None:
    async with baked.acquire(VmConfig(hostname="alone")) as vm:
        assert not vm.reused
        done = await vm.run_process(["hostname"], capture_stdout=True)
        assert done.stdout == b"alone\n"
    assert not machines()


@pytest.mark.vm
async def test_an_image_without_true_is_warmed_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    bare = await unbaked_image(f"rootfs:{tmp_path}")
    async with bare.pool().min(1).max(1).build() as pool, pool.acquire() as vm:
        with pytest.raises(FileNotFoundError):
            await vm.run_process(["true"])


@pytest.mark.vm
async def test_memory_that_is_taken_is_waited_for(baked: Image, admission: None) -> None:
    memory_admission.limit = 300
    pooling = baked.pool().min(1).max(2).acquire_timeout(PATIENCE)
    async with pooling.build() as pool, trio.open_nursery() as nursery:
        entered = trio.Event()

        async def second() -> None:
            async with pool.acquire() as vm:
                entered.set()
                await vm.run_process(["true"])

        async with pool.acquire():
            nursery.start_soon(second)
            await until(pool, starting=1)
            assert machines() == 1
            assert not entered.is_set()


@pytest.mark.vm
async def test_the_acquire_timeout_is_typed(baked: Image) -> None:
    async with baked.pool().max(1).acquire_timeout(0.1).build() as pool:
        with pytest.raises(AcquireTimeout):
            async with pool.acquire():
                pytest.fail("there was none, and a start takes longer than that")
        await until(pool, alive=0)
    assert not machines()


@pytest.mark.vm
async def test_500_random_cancellations_leak_nothing(baked: Image, admission: None) -> None:
    source = random.Random(1)
    before = len(os.listdir("/proc/self/fd"))

    async def use(pool: Pool) -> None:
        async with pool.acquire() as vm:
            await vm.run_process(["true"])

    async def cancelled(pool: Pool) -> None:
        with trio.move_on_after(source.random() * 0.1):
            await use(pool)

    async with baked.pool().min(1).max(2).restore_on_release(False).build() as pool:
        for _ in range(50):
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(cancelled, pool)
        await until(pool, in_use=0, waiting=0, starting=0, ending=0)
        assert pool.stats().idle == pool.stats().alive == machines()
        await use(pool)
        async with pool.acquire() as vm:
            done = await vm.run_process(["ps"], capture_stdout=True)
            assert b"true" not in done.stdout
    assert not machines()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.vm
async def test_a_random_history_of_real_vms_keeps_the_laws(baked: Image, admission: None) -> None:
    source = random.Random(7)

    async def use(
        pool: Pool, leave: trio.Event, task_status: trio.TaskStatus[trio.CancelScope]
    ) -> None:
        with trio.CancelScope() as scope:
            task_status.started(scope)
            try:
                async with pool.acquire() as vm:
                    await vm.run_process(["true"])
                    await leave.wait()
            except VmExited:
                pass

    pooling = baked.pool().min(1).max(3).config(VmConfig(restore_timeout=PATIENCE))
    async with pooling.build() as pool, trio.open_nursery() as nursery:
        users: list[tuple[trio.Event, trio.CancelScope]] = []
        for _ in range(30):
            what = source.choice(["acquire", "acquire", "release", "cancel", "kill", "resize"])
            if what == "acquire" or not users:
                leave = trio.Event()
                users.append((leave, await nursery.start(use, pool, leave)))
            elif what == "release":
                users.pop(source.randrange(len(users)))[0].set()
            elif what == "cancel":
                users.pop(source.randrange(len(users)))[1].cancel()
            elif what == "kill" and engines():
                os.kill(source.choice(sorted(engines())), signal.SIGKILL)
            else:
                low = source.randrange(3)
                pool.resize(min=low, max=3)
            await trio.sleep(source.random() * 0.2)
            now = pool.stats()
            assert now.alive == now.idle + now.in_use + now.starting + now.ending <= 3
            assert machines() <= 3
            assert not (now.idle and now.waiting)
        for leave, _ in users:
            leave.set()
        pool.resize(min=2, max=3)
        await until(pool, in_use=0, waiting=0, idle=2)
    assert not machines()


@pytest.mark.vm
async def test_leaving_the_pool_ends_what_is_in_use_starting_and_waiting(baked: Image) -> None:
    ended: list[str] = []

    async def use(pool: Pool) -> None:
        try:
            async with pool.acquire() as vm:
                await vm.run_process(["sleep", "1000"])
        except (trio.ClosedResourceError, VmExited) as error:
            ended.append(type(error).__name__)

    async with trio.open_nursery() as nursery:
        async with baked.pool().min(1).max(2).build() as pool:
            for _ in range(3):
                nursery.start_soon(use, pool)
            await until(pool, in_use=1, starting=1, waiting=2)
        assert not machines()
    assert len(ended) == 3
