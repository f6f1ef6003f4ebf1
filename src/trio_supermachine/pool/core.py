"""The pool's machinery: which things exist, who has them, and when to make or end one.

Theory of operation. The pool is generic over what it pools, an async context manager that gives a
``T``: nothing in here knows of virtual machines. A thing goes through these states:

    STARTING -> IDLE -> IN_USE -> ENDING
                  ^--------'            (restore_on_release off: released, and still alive)

From each state it may go to ENDING: it failed or died, there are more than ``max``, it was idle for
too long, or the pool closes. Each thing lives in a task of its own (``_live``) in the pool's
nursery, which enters its context manager, marks it idle, and leaves when its scope is cancelled.

All changes of state are plain code between two checkpoints, so that no task sees half of one. They
only record what is true now and wake the *keeper*, the one task that decides: it ends what is too
much (``_shrink``), begins what is missing (``_grow``), and sleeps until the next change, or until
an idle thing is due to end or a refill after a failure is due. Between changes it uses no CPU.

Invariants, after each change:

- Things are idle or acquirers wait, never both. A thing that gets ready goes to the first waiter.
- No more things exist than ``max``, those that start and end included.
- An idle thing is alive as far as is known.
- A waiter gets a thing, or one error. A failed start is told to the first waiter only if no other
  start may serve it.

After failures the keeper refills after pauses that double, up to 30 s, unless an acquirer waits.
Failures of the same generation, which were begun before the last one, count once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from enum import Enum, auto
from typing import Final, Generic, TypeVar

import attrs
import trio

from .._public import public
from .._util.nursery import open_flat_nursery
from ..errors import AcquireTimeout

T = TypeVar("T")

_FIRST_DELAY: Final = 0.1
_LONGEST_DELAY: Final = 30.0
#: Something that was there for so long did not fail because of how it was made; seconds.
_PROVEN: Final = 60.0


@attrs.frozen(kw_only=True)
class PoolSettings:
    """Bounds of a pool. Times are in seconds; infinity is no limit.

    ``head_start`` is how long a refill of a pool that was full waits after a hand-over, so that
    it does not compete with the acquirer's first steps.
    """

    min: int
    max: int
    idle_timeout: float = math.inf
    acquire_timeout: float = math.inf
    restore_on_release: bool = True
    head_start: float = 0


@public
@attrs.frozen(kw_only=True)
class PoolStats:
    """Numbers of a pool: what it holds at one moment, and what it has done so far.

    ``alive`` is ``idle + in_use + starting + ending`` and never above ``max``, but for VMs that
    are in use when :meth:`Pool.resize` lowers it.
    """

    #: VMs that wait, warm, to be acquired.
    idle: int
    #: VMs that somebody has acquired.
    in_use: int
    #: VMs that are being restored, or wait for a process-wide limit.
    starting: int
    #: VMs that are being torn down.
    ending: int
    #: VMs that exist, in whatever state.
    alive: int
    min: int
    max: int
    #: Acquirers that wait.
    waiting: int
    #: Acquires that got a VM.
    acquired_total: int
    #: VMs that were restored and got ready.
    restored_total: int
    #: Acquires that got a VM that had been used before.
    reused_total: int
    #: VMs that failed to start.
    failed_total: int
    #: VMs that ended by themselves, idle or in use.
    died_total: int
    #: The newest error of a VM that nobody held and nobody waited for.
    last_error: Exception | None


class _State(Enum):
    STARTING = auto()
    IDLE = auto()
    IN_USE = auto()
    ENDING = auto()


@attrs.define(eq=False)
class Lease(Generic[T]):
    """One pooled thing, and what its acquirer sees of it."""

    _generation: int  # how many failures in a row there had been when it was begun
    _state: _State = _State.STARTING
    _item: T | None = None
    _since: float = math.inf  # when it became ready; then, idle
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)  # its life
    _holder: trio.CancelScope = attrs.field(factory=trio.CancelScope)  # the acquirer's body
    _gone: trio.Event = attrs.field(factory=trio.Event)
    _error: Exception | None = None
    _ready_at: float = math.inf
    uses: int = 0  #: how often it has been acquired

    @property
    def item(self) -> T:
        assert self._item is not None
        return self._item


@attrs.define(eq=False)
class _Waiter(Generic[T]):
    decided: trio.Event = attrs.field(factory=trio.Event)
    lease: Lease[T] | None = None
    error: Exception | None = None


class PoolCore(Generic[T]):
    """A pool of things; :func:`open_pool` makes one."""

    def __init__(
        self,
        open_one: Callable[[], AbstractAsyncContextManager[T]],
        is_alive: Callable[[T], bool],
        settings: PoolSettings,
        nursery: trio.Nursery,
    ) -> None:
        self.settings: PoolSettings = settings
        self._open_one = open_one
        self._is_alive = is_alive
        self._nursery = nursery
        self._starting: list[Lease[T]] = []  # oldest first
        self._idle: list[Lease[T]] = []  # longest idle first
        self._in_use = 0
        self._alive = 0
        self._waiters: deque[_Waiter[T]] = deque()
        self._wake = trio.Event()
        self._filled = trio.Event()
        self._closed = False
        self._failures = 0
        self._not_before = -math.inf
        self._acquired_total = 0
        self._restored_total = 0
        self._reused_total = 0
        self._failed_total = 0
        self._died_total = 0
        self._last_error: Exception | None = None

    def stats(self) -> PoolStats:
        """Give the numbers, now."""
        return PoolStats(
            idle=len(self._idle),
            in_use=self._in_use,
            starting=len(self._starting),
            ending=self._alive - self._kept(),
            alive=self._alive,
            min=self.settings.min,
            max=self.settings.max,
            waiting=len(self._waiters),
            acquired_total=self._acquired_total,
            restored_total=self._restored_total,
            reused_total=self._reused_total,
            failed_total=self._failed_total,
            died_total=self._died_total,
            last_error=self._last_error,
        )

    def apply(self, settings: PoolSettings) -> None:
        """Keep to other settings from now on."""
        self.settings = settings
        self._wake.set()

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Lease[T]]:
        """Hold one thing for the length of a block."""
        lease = await self._take()
        lease.uses += 1
        self._acquired_total += 1
        self._reused_total += lease.uses > 1
        try:
            with lease._holder:
                yield lease
        except BaseExceptionGroup as group:
            # Tasks of the body that were using it all tell the same.
            if lease._state is _State.ENDING or not self._is_alive(lease.item):
                await lease._gone.wait()
                if lease._error is not None and _only_tells(group, lease._error):
                    raise lease._error from None
            raise
        finally:
            self._release(lease)
        if lease._holder.cancelled_caught:
            await lease._gone.wait()
            raise lease._error or _closed()

    # Acquirers

    async def _take(self) -> Lease[T]:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise _closed()
        for lease in reversed(self._idle):
            if self._is_alive(lease.item):
                self._idle.remove(lease)
                self._hand_out(lease)
                return lease
        waiter = _Waiter[T]()
        self._waiters.append(waiter)
        self._wake.set()
        seconds = self.settings.acquire_timeout
        try:
            with trio.move_on_after(seconds):
                await waiter.decided.wait()
        except BaseException:
            self._abandon(waiter)
            raise
        if waiter.lease is not None:
            return waiter.lease
        if waiter.error is not None:
            raise waiter.error
        self._abandon(waiter)
        raise AcquireTimeout(seconds)

    def _abandon(self, waiter: _Waiter[T]) -> None:
        """Leave nothing behind of an acquirer that waits no more."""
        enough = len(self._idle) + len(self._starting) >= self.settings.min
        if waiter.lease is not None:
            if waiter.lease.uses == 0 and not self._waiters and enough:
                self._release(waiter.lease, end=True)
            else:
                self._release(waiter.lease, end=False)
        elif waiter.error is not None:
            self._last_error = waiter.error
        else:
            self._waiters.remove(waiter)
            surplus = len(self._starting) - len(self._waiters)
            if surplus + len(self._idle) > self.settings.min and self._starting:
                self._end(self._starting[-1])

    def _hand_out(self, lease: Lease[T]) -> None:
        lease._state = _State.IN_USE
        lease._holder = trio.CancelScope()
        self._in_use += 1
        self._failures = 0
        was_full = len(self._starting) + len(self._idle) + 1 >= self.settings.min
        head_start = self.settings.head_start if was_full else -math.inf
        self._not_before = trio.current_time() + head_start
        self._wake.set()

    def _release(self, lease: Lease[T], end: bool | None = None) -> None:
        if lease._state is not _State.IN_USE:
            return  # it has died, or the pool was closed
        if self.settings.restore_on_release if end is None else end:
            self._end(lease)
        else:
            self._in_use -= 1
            self._place(lease)

    def _place(self, lease: Lease[T]) -> None:
        """Find a place for what is ready and nobody's: with the first waiter, or idle."""
        lease._state = _State.IDLE
        lease._since = trio.current_time()
        if not self._is_alive(lease.item) or self._kept() >= self.settings.max:
            self._idle.append(lease)
            self._end(lease)
        elif self._waiters:
            waiter = self._waiters.popleft()
            waiter.lease = lease
            self._hand_out(lease)
            waiter.decided.set()
        else:
            self._idle.append(lease)
            if len(self._idle) >= self.settings.min:
                self._filled.set()
        self._wake.set()

    # The things' lives

    async def _live(self, lease: Lease[T]) -> None:
        last: _State | None = None
        try:
            with lease._scope:
                async with self._open_one() as item:
                    lease._item = item
                    lease._ready_at = trio.current_time()
                    self._restored_total += 1
                    self._drop(lease)
                    self._place(lease)
                    try:
                        await trio.sleep_forever()
                    finally:
                        last = lease._state
                        self._drop(lease)
        except Exception as error:
            self._failed(lease, last or lease._state, error)
        finally:
            self._drop(lease)
            self._alive -= 1
            lease._gone.set()
            self._wake.set()

    def _drop(self, lease: Lease[T]) -> None:
        """Take it off the list of its state, and from whoever has it."""
        match lease._state:
            case _State.STARTING:
                self._starting.remove(lease)
            case _State.IDLE:
                self._idle.remove(lease)
            case _State.IN_USE:
                self._in_use -= 1
                lease._holder.cancel()
        lease._state = _State.ENDING

    def _end(self, lease: Lease[T]) -> None:
        self._drop(lease)
        lease._scope.cancel()

    def _failed(self, lease: Lease[T], last: _State, error: Exception) -> None:
        """Note that a thing did not start, or ended by itself; tell a waiter and the keeper."""
        lease._error = error
        match last:
            case _State.STARTING:
                self._failed_total += 1
                self._delay_refill(lease)
                # A waiter goes on waiting while another start may serve it.
                if len(self._waiters) >= max(1, len(self._starting)):
                    waiter = self._waiters.popleft()
                    waiter.error = error
                    waiter.decided.set()
                    return
            case _State.IDLE:
                self._died_total += 1
                self._delay_refill(lease)
            case _State.IN_USE:
                self._died_total += 1
                return  # its acquirer raises the error
        self._last_error = error
        self._filled.set()

    def _delay_refill(self, lease: Lease[T]) -> None:
        # What was begun before the last failure adds nothing: it is of the same generation.
        now = trio.current_time()
        if now - lease._ready_at >= _PROVEN:
            self._failures = 1
        elif lease._generation == self._failures:
            self._failures += 1
        else:
            return
        doublings = min(self._failures - 2, 16)
        delay = _FIRST_DELAY * 2**doublings if self._failures > 1 else 0
        self._not_before = now + min(delay, _LONGEST_DELAY)

    # The keeper

    async def keep(self) -> None:
        """Make and end things as the state calls for; asleep, without a timer, when it is right."""
        while True:
            self._wake = trio.Event()
            with trio.move_on_at(min(self._shrink(), self._grow())):
                await self._wake.wait()

    async def fill(self) -> None:
        """Wait until ``min`` things are idle. :raises Exception: one could not be made."""
        await trio.lowlevel.checkpoint()
        if len(self._idle) < self.settings.min:
            await self._filled.wait()
            if self._last_error is not None:
                raise self._last_error

    def close(self) -> None:
        """Refuse acquirers, those that wait too."""
        self._closed = True
        while self._waiters:
            waiter = self._waiters.popleft()
            waiter.error = _closed()
            waiter.decided.set()

    def _kept(self) -> int:
        return len(self._starting) + len(self._idle) + self._in_use

    def _shrink(self) -> float:
        """End what is too much. Returns when to look again, if nothing happens until then."""
        while self._kept() > self.settings.max and (self._idle or self._starting):
            self._end(self._idle[0] if self._idle else self._starting[-1])
        while len(self._idle) > self.settings.min:
            due = self._idle[0]._since + self.settings.idle_timeout
            if due > trio.current_time():
                return due
            self._end(self._idle[0])
        return math.inf

    def _grow(self) -> float:
        """Begin what is missing: at once for acquirers that wait, and up to ``min`` when due."""
        while self._alive < self.settings.max:
            coming = len(self._starting) + len(self._idle)
            if coming >= self.settings.min + len(self._waiters):
                break
            if coming >= len(self._waiters) and trio.current_time() < self._not_before:
                return self._not_before
            lease = Lease[T](self._failures)
            self._starting.append(lease)
            self._alive += 1
            self._nursery.start_soon(self._live, lease)
        return math.inf


@asynccontextmanager
async def open_pool(
    open_one: Callable[[], AbstractAsyncContextManager[T]],
    is_alive: Callable[[T], bool],
    settings: PoolSettings,
) -> AsyncIterator[PoolCore[T]]:
    """Open a pool for a block, which is entered when ``settings.min`` things are idle.

    ``is_alive`` tells of a thing that has ended, and whose context manager is about to raise.
    """
    async with open_flat_nursery() as nursery:
        core = PoolCore(open_one, is_alive, settings, nursery)
        nursery.start_soon(core.keep)
        try:
            await core.fill()
            yield core
        finally:
            core.close()
            nursery.cancel_scope.cancel()


def _closed() -> trio.ClosedResourceError:
    return trio.ClosedResourceError("the pool was closed")


def _only_tells(group: BaseExceptionGroup[BaseException], error: Exception) -> bool:
    same, other = group.split((type(error), trio.Cancelled))
    return same is not None and other is None and same.subgroup(type(error)) is not None
