"""Any history of a pool agrees with a plain model of what it owes its users."""

from __future__ import annotations

import math
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
import trio.testing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trio_supermachine import AcquireTimeout
from trio_supermachine.pool.core import PoolCore, PoolSettings

from ..support.pool_things import Died, NotMade, Thing, World

R = TypeVar("R")

#: Longer than any pause between refills that fail.
LONG = 1000.0


class User:
    """A task that acquires, holds until told, and notes how it ended."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.scope = trio.CancelScope()
        self.leave = trio.Event()
        self.fail_body = False
        self.thing: Thing | None = None
        self.uses = 0
        self.was_alive = False
        self.end: str | None = None

    async def run(self, pool: PoolCore[Thing]) -> None:
        with self.scope:
            try:
                async with pool.acquire() as lease:
                    self.was_alive = lease.item.alive
                    self.uses = lease.uses
                    self.thing = lease.item
                    await self.leave.wait()
                    if self.fail_body:
                        raise KeyError(self.number)
                self.end = "left"
            except (Died, NotMade, AcquireTimeout, KeyError, trio.ClosedResourceError) as error:
                self.end = type(error).__name__
        self.end = self.end or "cancelled"


class Loop:
    """A Trio run in a thread of its own, whose clock the test moves."""

    def __init__(self) -> None:
        self.clock = trio.testing.MockClock()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        trio.run(self._main, clock=self.clock)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._over = trio.Event()
        async with trio.open_nursery() as self.nursery:
            self._ready.set()
            await self._over.wait()
            self.nursery.cancel_scope.cancel()

    def call(self, step: Callable[[], Awaitable[R]]) -> R:
        return trio.from_thread.run(step, trio_token=self._token)

    def close(self) -> None:
        trio.from_thread.run_sync(lambda: self._over.set(), trio_token=self._token)
        self._thread.join()


class PoolMachine(RuleBasedStateMachine):
    """The model: who waits, in which order; who holds what; and laws on all else."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop()
        self.world = World(free=False)
        self.users: list[User] = []
        self.waiting: list[User] = []
        self.holding: list[User] = []
        self.seen: set[Thing] = set()
        self.troubled = False  # refills may be pausing
        self.close_pool = trio.Event()
        self.closed = trio.Event()

    # How it begins and ends

    @initialize(
        low=st.integers(0, 3),
        more=st.integers(0, 3),
        idle_timeout=st.sampled_from([math.inf, 10.0]),
        acquire_timeout=st.sampled_from([math.inf, math.inf, 5.0]),
        restore=st.booleans(),
    )
    def begin(
        self, low: int, more: int, idle_timeout: float, acquire_timeout: float, restore: bool
    ) -> None:
        self.settings = PoolSettings(
            min=low,
            max=max(1, low + more),
            idle_timeout=idle_timeout,
            acquire_timeout=acquire_timeout,
            restore_on_release=restore,
        )
        self.most_min, self.ceiling = low, self.settings.max
        self.loop.call(self._begin)

    async def _begin(self) -> None:
        self.world.free = True
        self.pool: PoolCore[Thing] = await self.loop.nursery.start(self._keep_open)
        self.world.free = False

    async def _keep_open(self, task_status: trio.TaskStatus[PoolCore[Thing]]) -> None:
        s = self.settings
        async with self.world.pool(
            min=s.min,
            max=s.max,
            idle_timeout=s.idle_timeout,
            acquire_timeout=s.acquire_timeout,
            restore_on_release=s.restore_on_release,
        ) as pool:
            task_status.started(pool)
            await self.close_pool.wait()
        self.closed.set()

    def teardown(self) -> None:
        try:
            if hasattr(self, "pool"):
                self.loop.call(self._end)
        finally:
            self.loop.close()

    async def _end(self) -> None:
        self.world.let_go()
        held = [user for user in self.users if user.end is None]
        self.close_pool.set()
        await self.closed.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert self.world.count() == 0
        assert {user.end for user in held} <= {"ClosedResourceError"}
        assert self.pool.stats().alive == 0

    # What may happen

    def step(
        self,
        happens: Callable[[], object],
        *,
        ends: tuple[User, str] | None = None,
        may: str | None = None,
    ) -> None:
        """Let one thing happen; one user must come to an end by it, waiters may."""

        async def run() -> None:
            happens()
            await trio.testing.wait_all_tasks_blocked()

        self.loop.call(run)
        for user in [*self.waiting, *self.holding]:
            if ends is not None and user is ends[0]:
                assert user.end == ends[1]
            elif user.end is not None:
                assert user in self.waiting
                assert user.end == may
        self.holding = [user for user in self.holding if user.end is None]
        given_up = ("cancelled", "AcquireTimeout")
        queue = [user for user in self.waiting if user.end not in given_up]
        decided = [user for user in queue if user.thing is not None or user.end is not None]
        assert decided == queue[: len(decided)], "out of order"
        self.waiting = queue[len(decided) :]
        for user in decided:
            if user.thing is not None:
                self.check_served(user, user.thing)

    def check_served(self, user: User, thing: Thing) -> None:
        assert user.was_alive
        assert all(thing is not other.thing for other in self.holding)
        assert (user.uses > 1) == (thing in self.seen)
        assert user.uses == 1 or not self.settings.restore_on_release
        self.seen.add(thing)
        self.holding.append(user)
        self.troubled = False

    @rule()
    def acquire(self) -> None:
        user = User(len(self.users))
        self.users.append(user)
        self.waiting.append(user)
        self.step(lambda: self.loop.nursery.start_soon(user.run, self.pool))

    @precondition(lambda self: self.holding)
    @rule(which=st.integers(0, 9), fails=st.booleans())
    def release(self, which: int, fails: bool) -> None:
        user = self.holding[which % len(self.holding)]
        user.fail_body = fails
        self.step(user.leave.set, ends=(user, "KeyError" if fails else "left"))

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 9))
    def cancel_a_waiter(self, which: int) -> None:
        user = self.waiting[which % len(self.waiting)]
        self.step(user.scope.cancel, ends=(user, "cancelled"))

    @precondition(lambda self: self.holding)
    @rule(which=st.integers(0, 9))
    def cancel_a_holder(self, which: int) -> None:
        user = self.holding[which % len(self.holding)]
        self.step(user.scope.cancel, ends=(user, "cancelled"))

    @precondition(lambda self: self.world.open)
    @rule(which=st.integers(0, 9))
    def kill(self, which: int) -> None:
        thing = self.world.open[which % len(self.world.open)]
        holder = next((user for user in self.holding if user.thing is thing), None)
        self.troubled |= holder is None
        thing.may_end.set()
        self.step(thing.die, ends=None if holder is None else (holder, "Died"))

    @precondition(lambda self: self.world.starting)
    @rule(which=st.integers(0, 9))
    def a_start_succeeds(self, which: int) -> None:
        self.step(self.world.starting[which % len(self.world.starting)].may_start.set)

    @precondition(lambda self: self.world.starting)
    @rule(which=st.integers(0, 9))
    def a_start_fails(self, which: int) -> None:
        thing = self.world.starting[which % len(self.world.starting)]
        thing.fails = True
        self.troubled = True
        waiting = len(self.waiting)
        told = waiting >= len(self.world.starting)
        self.step(thing.may_start.set, may="NotMade")
        assert len(self.waiting) == waiting - told

    @precondition(lambda self: self.world.ending)
    @rule(which=st.integers(0, 9))
    def an_end_is_over(self, which: int) -> None:
        self.step(self.world.ending[which % len(self.world.ending)].may_end.set)

    @rule(seconds=st.sampled_from([1.0, 6.0, LONG]))
    def time_passes(self, seconds: float) -> None:
        before = self.pool.stats().idle
        self.step(lambda: self.loop.clock.jump(seconds), may="AcquireTimeout")
        assert seconds < self.settings.acquire_timeout or not self.waiting
        if seconds == LONG:
            self.troubled = False
            if self.settings.idle_timeout < LONG:
                assert self.pool.stats().idle == min(before, self.settings.min)

    @rule(low=st.integers(0, 3), more=st.integers(0, 3))
    def resize(self, low: int, more: int) -> None:
        old = self.settings
        self.settings = PoolSettings(
            min=low,
            max=max(1, low + more),
            idle_timeout=old.idle_timeout,
            acquire_timeout=old.acquire_timeout,
            restore_on_release=old.restore_on_release,
        )
        self.most_min = max(self.most_min, low)
        self.step(lambda: self.pool.apply(self.settings))

    # What is always so

    @invariant()
    def the_laws_hold(self) -> None:
        if not hasattr(self, "pool"):
            return
        now, kept = self.pool.stats(), self.settings
        assert now.alive == now.idle + now.in_use + now.starting + now.ending == self.world.count()
        assert (now.in_use, now.waiting) == (len(self.holding), len(self.waiting))
        assert now.idle == len(self.world.open) - len(self.holding)
        assert not (now.idle and now.waiting)
        # Never above max; what was in use when max was lowered goes as it is released.
        self.ceiling = max(kept.max, min(self.ceiling, now.alive))
        assert now.alive <= self.ceiling
        assert now.alive - now.ending <= kept.max or now.idle == now.starting == 0
        if now.alive < kept.max:  # all that is owed is coming
            assert now.starting >= now.waiting
            assert self.troubled or now.idle + now.starting >= kept.min + now.waiting
        if kept.restore_on_release:  # and nothing that nobody wants
            assert now.idle + now.starting <= self.most_min + now.waiting
        assert now.restored_total >= now.acquired_total - now.reused_total


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
