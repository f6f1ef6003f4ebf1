"""The settings of a pool in the making."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import attrs

from .._util import validators as check
from ..config.defaults import DEFAULT_MEMORY_MIB
from ..config.vm import VmConfig
from ..errors import AdmissionRefused, ConfigError
from ..images.spec import ImageSpec
from ..vm.limits import memory_admission

if TYPE_CHECKING:
    from .core import PoolSettings

ImageT = TypeVar("ImageT", bound=ImageSpec)

#: What a short program takes, in seconds, on a host that is as busy restoring the next VM.
_HEAD_START = 0.03


@attrs.frozen(repr=False)
class PoolOptions(Generic[ImageT]):
    """A pool in the making. Immutable: each method gives a changed copy."""

    _image: ImageT
    _config: VmConfig = attrs.field(factory=VmConfig)
    _min: int = 0
    _max: int | None = None
    _idle_timeout: float = math.inf
    _acquire_timeout: float = math.inf
    _restore_on_release: bool = True

    def min(self, vms: int) -> Self:
        """Keep this many idle VMs ready, as far as ``max`` allows; 0 unless given."""
        return attrs.evolve(self, min=check.integer("min", vms, 0))

    def max(self, vms: int) -> Self:
        """Let no more than this many VMs exist, those that start or end too.

        Unless given, the number of the host's CPUs, or ``min`` where that is more.
        """
        return attrs.evolve(self, max=check.integer("max", vms, 1))

    def idle_timeout(self, seconds: float) -> Self:
        """End idle VMs beyond ``min`` after this many seconds; unless given, never."""
        return attrs.evolve(self, idle_timeout=check.seconds("idle_timeout", seconds))

    def acquire_timeout(self, seconds: float) -> Self:
        """Let an acquire raise :exc:`AcquireTimeout` after this many seconds.

        Unless given, it never does: a cancel scope does that.
        """
        return attrs.evolve(self, acquire_timeout=check.seconds("acquire_timeout", seconds))

    def restore_on_release(self, enabled: bool) -> Self:
        """Choose whether a released VM ends and a fresh one takes its place; true unless given.

        With ``False`` the next acquirer gets the same VM, with all that was left in it, and
        sees :attr:`PooledVm.reused` set.
        """
        return attrs.evolve(self, restore_on_release=check.boolean("restore_on_release", enabled))

    def config(self, config: VmConfig) -> Self:
        """Start the VMs with this configuration."""
        if not isinstance(config, VmConfig):
            raise ConfigError(f"config must be a VmConfig, not {config!r}")
        return attrs.evolve(self, config=config)

    def _settings(self) -> PoolSettings:
        from .core import PoolSettings  # most programs start VMs one by one

        most = max(os.cpu_count() or 1, self._min) if self._max is None else self._max
        settings = PoolSettings(
            min=self._min,
            max=most,
            idle_timeout=self._idle_timeout,
            acquire_timeout=self._acquire_timeout,
            restore_on_release=self._restore_on_release,
            head_start=_HEAD_START,
        )
        check_min(settings)
        return settings


def check_min(settings: PoolSettings) -> None:
    """Check the bounds against each other. :raises ConfigError: ``min`` is above ``max``."""
    if settings.min > settings.max:
        raise ConfigError(f"the pool's min of {settings.min} is above its max of {settings.max}")


def check_bounds(settings: PoolSettings, image: ImageSpec, config: VmConfig) -> None:
    """Check the bounds, and that the memory of ``min`` VMs can be admitted.

    :raises ConfigError: ``min`` is above ``max``.
    :raises AdmissionRefused: the memory of ``min`` VMs can never be admitted.
    """
    check_min(settings)
    baked = DEFAULT_MEMORY_MIB if image.memory_mib is None else image.memory_mib
    each = baked if config.memory_mib is None else config.memory_mib
    try:
        memory_admission.refuse_impossible(settings.min * each)
    except AdmissionRefused as error:
        error.add_note(f"the pool keeps min={settings.min} VMs of {each} MiB each")
        raise
