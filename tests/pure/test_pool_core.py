"""What a pool does, shown with things that are cheap to make."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing

from trio_supermachine import AcquireTimeout
from trio_supermachine.pool.core import PoolCore, PoolSettings

from ..support.pool_things import Died, NotMade, Thing, World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Where things start and end at once, and where none is left at the end."""
    world = World()
    yield world
    assert world.count() == 0


settle = trio.testing.wait_all_tasks_blocked


async def test_the_block_is_entered_when_min_are_idle(world: World) -> None:
    async with world.pool(min=3, max=4) as pool:
        assert (pool.stats().idle, pool.stats().alive) == (3, 3)
        assert len(world.open) == 3


async def test_an_acquire_of_an_idle_one_is_a_hand_over_with_one_checkpoint(world: World) -> None:
    async with world.pool(min=1) as pool:
        with trio.testing.assert_checkpoints():
            manager = pool.acquire()
            lease = await manager.__aenter__()
        assert lease.item in world.open
        assert pool.stats().idle == 0  # the refill has not even begun
        await manager.__aexit__(None, None, None)


async def test_an_acquire_is_replaced_in_the_background_up_to_max(world: World) -> None:
    async with world.pool(min=2, max=3) as pool, pool.acquire():
        await settle()
        assert (pool.stats().idle, pool.stats().alive) == (2, 3)
        async with pool.acquire():
            await settle()
            assert (pool.stats().idle, pool.stats().alive) == (1, 3)


async def test_a_refill_gives_the_acquirer_a_head_start_unless_somebody_waits(
    world: World, mock_clock: trio.testing.MockClock
) -> None:
    async with world.pool(min=2, max=5, head_start=1) as pool, pool.acquire():
        await settle()
        assert pool.stats().alive == 2
        mock_clock.jump(0.6)
        async with pool.acquire():  # this does not put it off any more
            mock_clock.jump(0.6)
            await settle()
            assert (pool.stats().idle, pool.stats().alive) == (2, 4)
            async with pool.acquire(), pool.acquire(), pool.acquire():
                assert pool.stats().alive == 5


async def test_a_released_thing_is_never_handed_out_again(world: World) -> None:
    seen = set()
    async with world.pool(min=1, max=2) as pool:
        for _ in range(10):
            async with pool.acquire() as lease:
                assert lease.uses == 1
                seen.add(lease.item)
        assert pool.stats().reused_total == 0
    assert len(seen) == 10


async def test_release_does_not_wait_for_the_end(world: World) -> None:
    async with world.pool(max=1) as pool:
        async with pool.acquire():
            world.free = False
        await settle()
        assert (pool.stats().ending, pool.stats().alive) == (1, 1)
        world.let_go()


async def settle_then(call: Callable[[], None]) -> None:
    await settle()
    call()


async def test_a_kept_thing_is_handed_out_again_and_says_so(world: World) -> None:
    async with world.pool(max=1, restore_on_release=False) as pool:
        async with pool.acquire() as first:
            thing = first.item
        async with pool.acquire() as second:
            assert (second.item, second.uses) == (thing, 2)
        assert pool.stats().reused_total == 1


async def test_a_kept_thing_that_died_is_not_kept(world: World) -> None:
    async with world.pool(max=1, restore_on_release=False) as pool:
        async with pool.acquire() as first:
            first.item.alive = False  # without a word to the body, as by Vm.stop()
        async with pool.acquire() as second:
            assert second.item is not first.item


async def test_acquirers_are_served_in_order(world: World, nursery: trio.Nursery) -> None:
    order: list[int] = []

    async def use(pool: PoolCore[Thing], number: int) -> None:
        async with pool.acquire():
            order.append(number)

    async with world.pool(max=1) as pool:
        async with pool.acquire():
            for number in range(5):
                nursery.start_soon(use, pool, number)
                await settle()
            assert pool.stats().waiting == 5
        await settle()
    assert order == [0, 1, 2, 3, 4]


async def test_the_acquire_timeout_is_an_error_that_names_the_time(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    async with world.pool(max=1, acquire_timeout=5) as pool, pool.acquire():
        before = trio.current_time()
        with pytest.raises(AcquireTimeout) as caught:
            async with pool.acquire():
                pytest.fail("acquired")
        assert caught.value.seconds == 5
        assert trio.current_time() - before == 5
        assert pool.stats().waiting == 0


async def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
    world = World(free=False)
    async with world.pool(max=2) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(enter, pool)
            await settle()
            assert (pool.stats().waiting, pool.stats().starting) == (1, 1)
            nursery.cancel_scope.cancel()
        await settle()
        assert (pool.stats().alive, world.count()) == (0, 0)


async def enter(pool: PoolCore[Thing]) -> None:
    async with pool.acquire():
        pytest.fail("acquired")


async def test_a_waiter_cancelled_as_it_is_served_leaves_nothing_behind() -> None:
    for _ in range(30):  # which of the two tasks runs first is left to chance
        world = World(free=False)
        async with world.pool(max=2) as pool:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(enter, pool)
                await settle()
                world.let_go()
                nursery.cancel_scope.cancel()
            await settle()
            assert (pool.stats().alive, pool.stats().acquired_total) == (0, 0)


async def test_idle_things_beyond_min_end_after_a_while(
    world: World, mock_clock: trio.testing.MockClock
) -> None:
    async with world.pool(min=1, max=3, idle_timeout=60, restore_on_release=False) as pool:
        async with pool.acquire(), pool.acquire(), pool.acquire():
            pass
        await settle()
        assert pool.stats().idle == 3
        mock_clock.jump(59)
        await settle()
        assert pool.stats().idle == 3
        mock_clock.jump(1)
        await settle()
        assert (pool.stats().idle, pool.stats().alive) == (1, 1)


async def test_no_timer_runs_when_none_is_due(world: World) -> None:
    async with world.pool(min=2, max=2, idle_timeout=60, acquire_timeout=5):
        await settle()
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == float("inf")


async def test_an_idle_thing_that_dies_is_replaced_and_never_handed_out(world: World) -> None:
    async with world.pool(min=1, max=2) as pool:
        (dead,) = world.open
        dead.die()
        async with pool.acquire() as lease:
            assert lease.item is not dead
        await settle()
        stats = pool.stats()
        assert (stats.idle, stats.died_total) == (1, 1)
        assert isinstance(stats.last_error, Died)


async def test_what_is_dead_but_not_yet_gone_is_not_handed_out(world: World) -> None:
    async with world.pool(min=1, max=2) as pool:
        (dead,) = world.open
        dead.alive = False  # as it is until its own task has been told
        async with pool.acquire() as lease:
            assert lease.item is not dead
        dead.die()


async def test_all_idle_things_that_die_at_once_are_replaced_at_once(world: World) -> None:
    async with world.pool(min=4, max=8) as pool:
        for thing in list(world.open):
            thing.die()
        await settle()
        assert (pool.stats().idle, pool.stats().died_total) == (4, 4)


async def test_a_death_in_use_cancels_and_fails_that_block_alone(world: World) -> None:
    async with world.pool(min=2, max=4) as pool:
        async with pool.acquire() as other:
            with pytest.raises(Died) as caught:
                async with pool.acquire() as lease, trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    lease.item.die()
                    await trio.sleep_forever()
            assert other.item.alive
            assert caught.value.args == (lease.item.number,)
        await settle()
        assert pool.stats().idle == 2
        assert pool.stats().last_error is None


async def test_tasks_that_were_told_of_the_death_make_no_group(world: World) -> None:
    async def use(thing: Thing) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise Died(thing.number)

    async with world.pool() as pool:
        with pytest.raises(Died):
            async with pool.acquire() as lease, trio.open_nursery() as nursery:
                nursery.start_soon(use, lease.item)
                nursery.start_soon(use, lease.item)
                await settle_then(lease.item.die)


async def test_nor_do_tasks_that_knew_of_it_before_the_pool(world: World) -> None:
    async def use(thing: Thing) -> None:
        await thing.died.wait()
        raise Died(thing.number)

    async def die_slowly(thing: Thing) -> None:
        await settle()
        thing.alive = False
        thing.died.set()
        await settle()
        thing.die()

    async with world.pool() as pool, trio.open_nursery() as outside:
        with pytest.raises(Died):
            async with pool.acquire() as lease, trio.open_nursery() as nursery:
                nursery.start_soon(use, lease.item)
                nursery.start_soon(use, lease.item)
                outside.start_soon(die_slowly, lease.item)


async def test_the_bodys_error_comes_out_as_itself(world: World) -> None:
    async with world.pool() as pool:
        error = KeyError("mine")
        with pytest.raises(KeyError) as caught:
            async with pool.acquire():
                raise error
        assert caught.value is error
        with pytest.raises(ExceptionGroup) as group:
            async with pool.acquire():
                raise ExceptionGroup("mine", [error])
        assert group.value.message == "mine"


async def test_a_failed_first_start_comes_out_bare_and_leaves_nothing(world: World) -> None:
    world.broken = True
    with pytest.raises(NotMade):
        async with world.pool(min=3, max=4):
            pytest.fail("entered")


async def test_each_failed_start_is_told_to_the_first_waiter(nursery: trio.Nursery) -> None:
    world = World(free=False)
    told: list[int] = []

    async def use(pool: PoolCore[Thing], number: int) -> None:
        try:
            async with pool.acquire():
                told.append(number)
        except NotMade:
            told.append(-number)

    async with world.pool(max=2) as pool:
        for number in (1, 2, 3):
            nursery.start_soon(use, pool, number)
            await settle()
        world.starting[1].fails = True
        world.starting[1].may_start.set()
        await settle()
        assert told == [-1]
        assert pool.stats().starting == 2
        world.let_go()
        await settle()
        assert sorted(told) == [-1, 2, 3]
        assert pool.stats().last_error is None


async def test_refills_that_fail_are_tried_again_after_growing_pauses(
    world: World, mock_clock: trio.testing.MockClock
) -> None:
    async with world.pool(min=1, max=2) as pool:
        world.broken = True
        world.open[0].die()
        await settle()
        made = [world.made]
        for _ in range(400):
            mock_clock.jump(1)
            await settle()
            made.append(world.made)
        assert made[0] == 2  # the first is at once
        assert made[-1] < 30
        assert made[-1] > made[-100]  # and it never gives up
        assert pool.stats().failed_total == made[-1] - 1
        with pytest.raises(NotMade):  # somebody who waits does not wait for that
            async with pool.acquire():
                pytest.fail("acquired")
        world.broken = False
        async with pool.acquire():
            await settle()
            assert pool.stats().idle == 1


async def test_a_raised_min_is_filled_and_a_lowered_max_ends_what_nobody_uses(
    world: World,
) -> None:
    async with world.pool(min=0, max=6) as pool:
        pool.apply(PoolSettings(min=4, max=6))
        await settle()
        assert pool.stats().idle == 4
        async with pool.acquire() as one, pool.acquire() as two:
            pool.apply(PoolSettings(min=1, max=1))
            await settle()
            assert (pool.stats().idle, pool.stats().in_use, pool.stats().alive) == (0, 2, 2)
            assert one.item.alive
            assert two.item.alive
        await settle()
        assert (pool.stats().idle, pool.stats().alive) == (1, 1)


async def test_a_lowered_max_is_reached_though_others_wait_for_what_is_released(
    world: World, nursery: trio.Nursery
) -> None:
    leave = trio.Event()
    async with world.pool(max=2, restore_on_release=False) as pool:
        async with pool.acquire(), pool.acquire():
            nursery.start_soon(hold, pool, leave)
            nursery.start_soon(hold, pool, leave)
            await settle()
            pool.apply(PoolSettings(min=0, max=1, restore_on_release=False))
        await settle()
        assert (pool.stats().alive, pool.stats().in_use, pool.stats().waiting) == (1, 1, 1)
        leave.set()
        await settle()


async def hold(pool: PoolCore[Thing], leave: trio.Event) -> None:
    async with pool.acquire():
        await leave.wait()


async def test_leaving_the_pool_ends_those_in_use_and_those_who_wait(world: World) -> None:
    told: list[str] = []

    async def use(pool: PoolCore[Thing]) -> None:
        try:
            async with pool.acquire():
                await trio.sleep_forever()
        except trio.ClosedResourceError as error:
            told.append(str(error))

    async with trio.open_nursery() as nursery:
        async with world.pool(max=1) as pool:
            nursery.start_soon(use, pool)
            nursery.start_soon(use, pool)
            await settle()
        assert world.count() == 0
        with pytest.raises(trio.ClosedResourceError):
            async with pool.acquire():
                pytest.fail("acquired")
    assert told == ["the pool was closed"] * 2


async def test_cancelling_the_entry_leaves_nothing() -> None:
    world = World(free=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(enter_pool, world)
        await settle()
        assert len(world.starting) == 3
        nursery.cancel_scope.cancel()
    assert world.count() == 0


async def enter_pool(world: World) -> None:
    async with world.pool(min=3, max=3):
        pytest.fail("entered")


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("seed", range(3))
async def test_500_random_cancellations_leak_nothing(
    world: World, seed: int, restore: bool
) -> None:
    source = random.Random(seed)

    async def use(pool: PoolCore[Thing]) -> None:
        async with pool.acquire() as lease:
            assert lease.item.alive
            for _ in range(source.randrange(4)):
                await trio.lowlevel.checkpoint()

    async def cancelled(pool: PoolCore[Thing]) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(use, pool)
                for _ in range(source.randrange(12)):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

    async with world.pool(min=1, max=4, restore_on_release=restore) as pool:
        for _ in range(50):
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(cancelled, pool)
        await settle()
        stats = pool.stats()
        assert (stats.in_use, stats.waiting, stats.starting, stats.ending) == (0, 0, 0, 0)
        assert stats.idle == stats.alive == len(world.open) >= 1
        assert world.most <= 4
        assert stats.acquired_total > 50


async def test_a_pool_that_is_cancelled_at_any_moment_leaves_nothing(world: World) -> None:
    async def use(pool: PoolCore[Thing]) -> None:
        while True:
            async with pool.acquire():
                await trio.lowlevel.checkpoint()

    for ticks in range(40):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as killer:

                async def run(scope: trio.CancelScope = scope) -> None:
                    async with world.pool(min=1, max=3) as pool, trio.open_nursery() as users:
                        for _ in range(4):
                            users.start_soon(use, pool)

                killer.start_soon(run)
                for _ in range(ticks):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        assert world.count() == 0
