"""Things to pool that are cheap to make, and that start, end and die as a test says."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from trio_supermachine.pool.core import PoolCore, PoolSettings, open_pool


class Died(Exception):
    """A thing has ended by itself."""


class NotMade(Exception):
    """A thing could not be made."""


class Thing:
    """Alive for the length of a block, like a VM: its death cancels the block's body."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.alive = True
        self.fails = False
        self.may_start = trio.Event()
        self.may_end = trio.Event()
        self.died = trio.Event()
        self._body = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<thing {self.number}>"

    def die(self) -> None:
        self.alive = False
        self.died.set()
        self._body.cancel()


class World:
    """Where the things are: by what happens to them, oldest first.

    Unless it is ``free``, each start and each end waits until the test lets it happen.
    """

    def __init__(self, *, free: bool = True) -> None:
        self.free = free
        self.made = 0
        self.most = 0
        self.broken = False
        self.starting: list[Thing] = []
        self.open: list[Thing] = []
        self.ending: list[Thing] = []

    def count(self) -> int:
        return len(self.starting) + len(self.open) + len(self.ending)

    def let_go(self) -> None:
        self.free = True
        for thing in (*self.starting, *self.open, *self.ending):
            thing.may_start.set()
            thing.may_end.set()

    @asynccontextmanager
    async def make(self) -> AsyncIterator[Thing]:
        self.made += 1
        thing = Thing(self.made)
        self.starting.append(thing)
        self.most = max(self.most, self.count())
        try:
            await trio.lowlevel.checkpoint()
            if not self.free:
                await thing.may_start.wait()
            if thing.fails or self.broken:
                raise NotMade(thing.number)
        finally:
            self.starting.remove(thing)
        self.open.append(thing)
        try:
            with thing._body:
                yield thing
            if not thing.alive:
                raise Died(thing.number)
        finally:
            self.open.remove(thing)
            self.ending.append(thing)
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
                if not self.free:
                    await thing.may_end.wait()
            self.ending.remove(thing)

    def pool(
        self,
        *,
        min: int = 0,
        max: int = 2,
        idle_timeout: float = math.inf,
        acquire_timeout: float = math.inf,
        restore_on_release: bool = True,
        head_start: float = 0,
    ) -> AbstractAsyncContextManager[PoolCore[Thing]]:
        settings = PoolSettings(
            min=min,
            max=max,
            idle_timeout=idle_timeout,
            acquire_timeout=acquire_timeout,
            restore_on_release=restore_on_release,
            head_start=head_start,
        )
        return open_pool(self.make, lambda thing: thing.alive, settings)
