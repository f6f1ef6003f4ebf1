"""Process-wide limits: the memory promised to guests, and the VMs that start at once.

Both are gates through which tasks pass in the order of their arrival. They hold for the process,
not for one :func:`trio.run`: several runs may wait at the same gate, side by side in threads or one
after another. So the state is behind a :class:`threading.Lock`, and a waiting task is woken through
the token of its own run.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, final

import attrs
import trio
from trio.lowlevel import TrioToken, enable_ki_protection

from .._public import public
from .._util import validators as check
from ..errors import AdmissionRefused, ConfigError
from ..host.memory import usable_memory_mib

#: The share of the memory this process may use that guests are promised by default.
MEMORY_SHARE: Final = 0.75

_UNKNOWN_HOST_MIB: Final = 2048


@public
@attrs.frozen(kw_only=True)
class LimitStatistics:
    """Numbers of a process-wide limit at one moment.

    For :data:`memory_admission`, ``limit`` and ``in_use`` are in MiB; for
    :data:`spawn_concurrency` they count starts. ``holders`` and ``waiting`` count VMs.
    """

    limit: float
    in_use: int
    holders: int
    waiting: int


@attrs.define(eq=False)
class _Ticket:
    amount: int
    token: TrioToken
    decided: trio.Event = attrs.field(factory=trio.Event)
    admitted: bool = False
    refused_by: float | None = None  # the limit that it was too much for

    @property
    def waiting(self) -> bool:
        return not self.admitted and self.refused_by is None


class _Gate:
    """Gives out amounts of a limited thing in the order of arrival.

    A large request at the head of the queue holds up smaller ones behind it, so that it is
    served at all.
    """

    def __init__(self, limit: float) -> None:
        self._lock = threading.Lock()
        self._limit = limit
        self._in_use = 0
        self._holders = 0
        self._queue: deque[_Ticket] = deque()

    @property
    def limit(self) -> float:
        return self._limit

    @enable_ki_protection
    def set_limit(self, limit: float) -> None:
        with self._lock:
            self._limit = limit
            for ticket in [t for t in self._queue if t.amount > limit]:
                self._queue.remove(ticket)
                ticket.refused_by = limit
                self._wake(ticket)
            self._admit_head()

    @enable_ki_protection
    async def acquire(self, amount: int) -> float | None:
        """Wait for ``amount``. A result is the limit, now or later, that it can never fit."""
        await trio.lowlevel.checkpoint_if_cancelled()
        ticket = _Ticket(amount, trio.lowlevel.current_trio_token())
        with self._lock:
            if amount > self._limit:
                ticket.refused_by = self._limit
            else:
                self._queue.append(ticket)
                self._admit_head()
        if ticket.waiting:
            try:
                await ticket.decided.wait()
            except trio.Cancelled:
                self._withdraw(ticket)
                raise
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return ticket.refused_by

    @enable_ki_protection
    def release(self, amount: int) -> None:
        with self._lock:
            self._in_use -= amount
            self._holders -= 1
            self._admit_head()

    def statistics(self) -> LimitStatistics:
        with self._lock:
            return LimitStatistics(
                limit=self._limit,
                in_use=self._in_use,
                holders=self._holders,
                waiting=len(self._queue),
            )

    @enable_ki_protection
    def _withdraw(self, ticket: _Ticket) -> None:
        with self._lock:
            if ticket.waiting:
                self._queue.remove(ticket)
                self._admit_head()  # it may have been the one that held up the others
                return
        if ticket.admitted:
            self.release(ticket.amount)

    def _admit_head(self) -> None:
        while self._queue and self._in_use + self._queue[0].amount <= self._limit:
            ticket = self._queue.popleft()
            if self._wake(ticket):
                ticket.admitted = True
                self._in_use += ticket.amount
                self._holders += 1

    def _wake(self, ticket: _Ticket) -> bool:
        try:
            ticket.token.run_sync_soon(ticket.decided.set)
        except trio.RunFinishedError:  # its run crashed, and took the waiting task with it
            return False
        return True


@final
class MemoryAdmission:
    """The limit on the memory that running guests were promised; see :data:`memory_admission`."""

    def __init__(self) -> None:
        self._made: _Gate | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<memory_admission {self.statistics()}>"

    @property
    def _gate(self) -> _Gate:
        with self._lock:
            if self._made is None:  # the host is asked when it matters, not at the import
                self._made = _Gate(_default_memory_mib())
            return self._made

    @property
    def limit(self) -> float:
        """MiB that guests may be promised; settable, :data:`math.inf` for no limit.

        Lowering it ends no VM. Whoever waits for more than the new limit gets
        :exc:`AdmissionRefused`; raising it lets in whom it can.
        """
        return self._gate.limit

    @limit.setter
    def limit(self, mib: float) -> None:
        self._gate.set_limit(_checked_limit(mib))

    @asynccontextmanager
    async def admit(self, mib: int) -> AsyncIterator[None]:
        """Hold ``mib`` MiB of the limit for the length of a block, waiting in order for it.

        A cancelled waiter leaves the queue and holds nothing.

        :raises AdmissionRefused: it is more than the whole limit; at once, or when the limit is
            lowered during the wait.
        :raises ConfigError: ``mib`` is no integer above 0.
        """
        check.integer("mib", mib, 1)
        gate = self._gate
        refused_by = await gate.acquire(mib)
        if refused_by is not None:
            raise AdmissionRefused(mib, int(refused_by))
        try:
            yield
        finally:
            gate.release(mib)

    def statistics(self) -> LimitStatistics:
        """Give the numbers, now, in MiB."""
        return self._gate.statistics()


@final
class SpawnConcurrency:
    """The limit on VMs that start at the same time; see :data:`spawn_concurrency`."""

    def __init__(self) -> None:
        self._gate = _Gate(_default_spawns())

    def __repr__(self) -> str:
        return f"<spawn_concurrency {self.statistics()}>"

    @property
    def limit(self) -> float:
        """How many VMs may boot or be restored at once; settable, :data:`math.inf` for any."""
        return self._gate.limit

    @limit.setter
    def limit(self, starts: float) -> None:
        self._gate.set_limit(_checked_limit(starts))

    async def __aenter__(self) -> None:
        """Wait, in order, for a place. A cancelled waiter leaves the queue and holds none."""
        await self._gate.acquire(1)  # never refused: a limit is at least 1

    async def __aexit__(self, *_: object) -> None:
        self._gate.release(1)

    def statistics(self) -> LimitStatistics:
        """Give the numbers, now."""
        return self._gate.statistics()


def _checked_limit(value: float) -> float:
    if value == math.inf and not isinstance(value, bool):
        return value
    try:
        return check.integer("limit", value, 1)
    except ConfigError as error:
        raise ConfigError(f"{error}; math.inf is no limit") from None


def _default_memory_mib() -> int:
    usable = usable_memory_mib()
    return max(1, int((_UNKNOWN_HOST_MIB if usable is None else usable) * MEMORY_SHARE))


def _default_spawns() -> int:
    return max(2, len(os.sched_getaffinity(0)))


#: The process-wide limit on the memory that guests were promised, in MiB.
#:
#: A VM holds its ``memory_mib`` from before its start until nothing of it is left. The default is
#: three quarters of the host's memory, or of the control group's where that is less.
memory_admission: Final = MemoryAdmission()

#: The process-wide limit on boots and restores in flight.
#:
#: A start keeps about one CPU busy until the guest answers: more at once than there are CPUs only
#: makes each of them late. The default is the number of CPUs this process may use, but at least
#: 2, so that one start that hangs does not hold up all others until its timeout.
spawn_concurrency: Final = SpawnConcurrency()


def refuse_impossible(mib: int) -> None:
    """Check that ``mib`` MiB can be admitted some day.

    :raises AdmissionRefused: they are more than the whole limit of :data:`memory_admission`.
    """
    limit = memory_admission.limit
    if mib > limit:
        raise AdmissionRefused(mib, int(limit))
