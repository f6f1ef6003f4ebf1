"""The settings of a pool in the making."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import attrs

from .._public import NoPublicConstructor
from .._util import validators as check
from ..config.defaults import DEFAULT_MEMORY_MIB
from ..config.vm import VmConfig
from ..errors import AdmissionRefused, ConfigError
from ..images.spec import ImageSpec
from ..vm.limits import refuse_impossible

if TYPE_CHECKING:
    from .core import PoolSettings

ImageT = TypeVar("ImageT", bound=ImageSpec)

#: What a short program takes, in seconds, on a host that is as busy restoring the next VM.
_HEAD_START = 0.03


@attrs.frozen(kw_only=True)
class _Options:
    """What a builder has gathered."""

    config: VmConfig = attrs.field(factory=VmConfig)
    min: int = 0
    max: int | None = None
    idle_timeout: float = math.inf
    acquire_timeout: float = math.inf
    restore_on_release: bool = True

    def settings(self) -> PoolSettings:
        """Make the settings. :raises ConfigError: ``min`` is above ``max``."""
        from .core import PoolSettings  # most programs start VMs one by one

        most = max(os.cpu_count() or 1, self.min) if self.max is None else self.max
        settings = PoolSettings(
            min=self.min,
            max=most,
            idle_timeout=self.idle_timeout,
            acquire_timeout=self.acquire_timeout,
            restore_on_release=self.restore_on_release,
            head_start=_HEAD_START,
        )
        check_min(settings)
        return settings


@attrs.frozen(repr=False)
class PoolOptions(Generic[ImageT], metaclass=NoPublicConstructor):
    """A pool in the making. Immutable: each method gives a changed copy."""

    _made_by = "Image.pool"

    _image: ImageT
    _options: _Options = attrs.field(factory=_Options)

    def min(self, vms: int) -> Self:
        """Keep this many idle VMs ready, as far as ``max`` allows; 0 unless given.

        :param vms: a number of VMs, 0 or more.
        """
        return self._with(min=check.integer("min", vms, 0))

    def max(self, vms: int) -> Self:
        """Let no more than this many VMs exist, those that start or end too.

        Unless given, the number of the host's CPUs, or ``min`` where that is more.

        :param vms: a number of VMs, 1 or more.
        """
        return self._with(max=check.integer("max", vms, 1))

    def idle_timeout(self, seconds: float) -> Self:
        """End idle VMs beyond ``min`` after this many seconds; unless given, never.

        :param seconds: above 0; ``math.inf`` is never.
        """
        return self._with(idle_timeout=check.seconds("idle_timeout", seconds))

    def acquire_timeout(self, seconds: float) -> Self:
        """Let an acquire raise :exc:`AcquireTimeout` after this many seconds.

        Unless given, it never does: a cancel scope does that.

        :param seconds: above 0; ``math.inf`` is never.
        """
        return self._with(acquire_timeout=check.seconds("acquire_timeout", seconds))

    def restore_on_release(self, enabled: bool) -> Self:
        """Choose whether a released VM ends and a fresh one takes its place; true unless given.

        With ``False`` the next acquirer gets the same VM, with all that was left in it, and
        sees :attr:`PooledVm.reused` set.

        :param enabled: whether it ends.
        """
        return self._with(restore_on_release=check.boolean("restore_on_release", enabled))

    def config(self, config: VmConfig) -> Self:
        """Start the VMs with this configuration.

        :param config: what :meth:`Vm.start` takes.
        """
        if not isinstance(config, VmConfig):
            raise ConfigError(f"config must be a VmConfig, not {config!r}")
        return self._with(config=config)

    def _with(self, **changes: Any) -> Self:
        return type(self)._create(self._image, attrs.evolve(self._options, **changes))


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
        refuse_impossible(settings.min * each)
    except AdmissionRefused as error:
        error.add_note(f"the pool keeps min={settings.min} VMs of {each} MiB each")
        raise
