"""Pools of warm VMs: one image, many VMs, each handed out for one task."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from . import _validators as check
from ._pool_core import PoolCore, PoolSettings, PoolStats, open_pool
from .config import VmConfig
from .errors import AdmissionRefused, ConfigError, RestoreTimeout, StartTimeout
from .limits import memory_admission
from .resources import DEFAULT_MEMORY_MIB
from .trial import run_trial
from .vm import Vm

if TYPE_CHECKING:
    from .images.image import Image


#: What a short program takes, in seconds, on a host that is as busy restoring the next VM.
_HEAD_START: Final = 0.03


@final
class PooledVm(Vm):
    """A :class:`Vm` that was acquired: all that a VM has, and whether it was used before.

    It ends, or goes back to its pool, when the block that acquired it ends.

    :ivar reused: somebody else has had it, which a pool with ``restore_on_release(False)`` does;
        what they left in it is still there.
    """

    __slots__ = ("reused",)

    def __init__(self, vm: Vm, *, reused: bool) -> None:
        # A view of the same VM, with the same state, and a mark of its own for each acquirer.
        self.__dict__ = vm.__dict__
        self.reused = reused


@final
class Pool:
    """VMs of one image that are kept restored and warm. Only :meth:`PoolBuilder.build` makes one.

    It belongs to the run that entered it; its methods are for the tasks of that run.
    """

    def __init__(self, core: PoolCore[Vm], image: Image, config: VmConfig) -> None:
        self._core = core
        self._image = image
        self._config = config

    def __repr__(self) -> str:
        return f"<Pool of {self._image.reference!r}: {self.stats()}>"

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[PooledVm]:
        """Have a VM to oneself: an async context manager giving a :class:`PooledVm`.

        An idle VM is handed over at once. Else the acquirer waits, in the order of arrival, for
        the next that gets ready, and one is restored for it as long as there are fewer than
        ``max``. Leaving the block, by any path, is quick: the VM ends in the background, or
        waits for the next acquirer after ``restore_on_release(False)``.

        Cancelled while it waits, it leaves the queue, and a restore that was begun for it ends
        too. A VM that ends by itself cancels the body of this block alone, which then raises
        :exc:`VmExited`.

        :raises AcquireTimeout: no VM was to be had within the pool's ``acquire_timeout``.
        :raises VmExited: the VM ended during the block.
        :raises trio.ClosedResourceError: the pool was closed, before or during the block.
        :raises SupermachineError: a VM was restored for this acquirer, and failed; errors are as
            of :meth:`Vm.start`. Each failed restore is told to one acquirer, the first that
            waits, unless another restore in flight may serve it.
        """
        async with self._core.acquire() as lease:
            try:
                yield PooledVm(lease.item, reused=lease.uses > 1)
            finally:
                lease.item._network.end_forwards()  # which are this acquirer's

    def stats(self) -> PoolStats:
        """What the pool holds, now."""
        return self._core.stats()

    def resize(self, *, min: int | None = None, max: int | None = None) -> None:
        """Change how many VMs are kept, from now on; ``None`` leaves a bound as it is.

        Raising ``min`` restores more in the background. Lowering ``max`` ends VMs that are idle
        or being restored; those in use stay with their acquirers, and end when released.

        :raises ConfigError: ``min`` is above ``max``, or one of them makes no sense.
        :raises AdmissionRefused: the memory of ``min`` VMs can never be admitted.
        """
        now = self._core.settings
        settings = attrs.evolve(
            now,
            min=now.min if min is None else check.integer("min", min, 0),
            max=now.max if max is None else check.integer("max", max, 1),
        )
        _check_bounds(settings, self._image, self._config)
        self._core.apply(settings)


@final
@attrs.frozen
class PoolBuilder:
    """A pool in the making, from :meth:`Image.pool`. Immutable: every method gives a changed copy.

    :raises ConfigError: a value makes no sense.
    """

    _image: Image
    _config: VmConfig = attrs.field(factory=VmConfig)
    _min: int = 0
    _max: int | None = None
    _idle_timeout: float = math.inf
    _acquire_timeout: float = math.inf
    _restore_on_release: bool = True

    def min(self, vms: int) -> PoolBuilder:
        """How many idle VMs the pool keeps ready, as far as ``max`` allows; 0 unless given."""
        return attrs.evolve(self, min=check.integer("min", vms, 0))

    def max(self, vms: int) -> PoolBuilder:
        """How many VMs exist at most, those that start or end too.

        Unless given, the number of the host's CPUs, or ``min`` where that is more.
        """
        return attrs.evolve(self, max=check.integer("max", vms, 1))

    def idle_timeout(self, seconds: float) -> PoolBuilder:
        """After how many seconds idle VMs beyond ``min`` end; unless given, never."""
        return attrs.evolve(self, idle_timeout=check.seconds("idle_timeout", seconds))

    def acquire_timeout(self, seconds: float) -> PoolBuilder:
        """After how many seconds an acquire gives up with :exc:`AcquireTimeout`; unless given,
        never: a cancel scope does that.
        """
        return attrs.evolve(self, acquire_timeout=check.seconds("acquire_timeout", seconds))

    def restore_on_release(self, enabled: bool) -> PoolBuilder:
        """Whether a released VM ends and a fresh one takes its place; true unless given.

        With ``False`` the next acquirer gets the same VM, with all that was left in it, and
        sees :attr:`PooledVm.reused` set.
        """
        return attrs.evolve(self, restore_on_release=check.boolean("restore_on_release", enabled))

    def config(self, config: VmConfig) -> PoolBuilder:
        """How to start the VMs."""
        if not isinstance(config, VmConfig):
            raise ConfigError(f"config must be a VmConfig, not {config!r}")
        return attrs.evolve(self, config=config)

    def build(self) -> AbstractAsyncContextManager[Pool]:
        """The pool: an async context manager, entered when ``min`` VMs are idle and warm.

        Leaving the block, by any path, ends all its VMs, those in use too, and waits until
        nothing of them is left. VMs that die while idle are replaced. When restores fail one
        after another, the pool tries again after growing pauses, 30 s at most, unless an
        acquirer waits; :attr:`PoolStats.last_error` is the newest such error.

        :raises ConfigError: ``min`` is above ``max``.
        :raises AdmissionRefused: on entry, before any VM starts: the memory of ``min`` VMs can
            never be admitted.
        :raises SupermachineError: on entry: one of the first VMs could not be started; errors
            are as of :meth:`Vm.start`.
        """
        most = max(os.cpu_count() or 1, self._min) if self._max is None else self._max
        settings = PoolSettings(
            min=self._min,
            max=most,
            idle_timeout=self._idle_timeout,
            acquire_timeout=self._acquire_timeout,
            restore_on_release=self._restore_on_release,
            head_start=_HEAD_START,
        )
        _check_min(settings)
        return _open(self._image, self._config, settings)


def pool_of(image: Image) -> PoolBuilder:
    """What :meth:`Image.pool` gives."""
    return PoolBuilder(image)


@asynccontextmanager
async def acquire(image: Image, config: VmConfig | None = None) -> AsyncIterator[PooledVm]:
    """What :meth:`Image.acquire` gives: a VM restored on demand, of which nothing is kept."""
    async with Vm.start(image, config) as vm:
        yield PooledVm(vm, reused=False)


@asynccontextmanager
async def _open(image: Image, config: VmConfig, settings: PoolSettings) -> AsyncIterator[Pool]:
    _check_bounds(settings, image, config)

    def open_one() -> AbstractAsyncContextManager[Vm]:
        return _open_warm(image, config)

    async with open_pool(open_one, _is_alive, settings) as core:
        yield Pool(core, image, config)


@asynccontextmanager
async def _open_warm(image: Image, config: VmConfig) -> AsyncIterator[Vm]:
    async with Vm.start(image, config) as vm:
        restored = vm.started_by == "restore"
        seconds = config.restore_timeout if restored else config.start_timeout
        with trio.move_on_after(seconds) as scope:
            await run_trial(vm)
        if scope.cancelled_caught:
            console = vm.console.tail().decode("utf-8", "replace")
            raise (RestoreTimeout if restored else StartTimeout)(seconds, console=console)
        yield vm


def _is_alive(vm: Vm) -> bool:
    return vm._exited is None and not vm._stopping


def _check_min(settings: PoolSettings) -> None:
    if settings.min > settings.max:
        raise ConfigError(f"the pool's min of {settings.min} is above its max of {settings.max}")


def _check_bounds(settings: PoolSettings, image: Image, config: VmConfig) -> None:
    _check_min(settings)
    baked = DEFAULT_MEMORY_MIB if image.memory_mib is None else image.memory_mib
    each = baked if config.memory_mib is None else config.memory_mib
    try:
        memory_admission.refuse_impossible(settings.min * each)
    except AdmissionRefused as error:
        error.add_note(f"the pool keeps min={settings.min} VMs of {each} MiB each")
        raise
