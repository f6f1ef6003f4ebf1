"""Configuration of a VM."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Final, get_args

import attrs

from .._public import public
from .._util import validators as check
from .._util.validators import StrPath
from ..devices.virtio import VirtioDevice
from ..errors import ConfigError, NotSupported
from ..host.assets import AssetPaths
from ..net.policy import EgressPolicy
from .defaults import DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, EngineName
from .resources import VolumeSpec, volume_tuple

MIN_MEMORY_MIB: Final = 32
MAX_VCPUS: Final = 16
MAX_DEVICES: Final = 8

# Labels of letters, digits and hyphens; 64 bytes is what Linux's sethostname takes.
_HOSTNAME = re.compile(
    r"(?!.{65})[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)


@public
class SymlinkPolicy(Enum):
    """What becomes of symbolic links in a mounted host directory."""

    #: The guest sees the link and resolves it among its own files; the host never follows one.
    OPAQUE = "opaque"


@public
@attrs.frozen
class MountSpec:
    """A host directory that the guest sees at ``guest_path``, under the file-system tag ``tag``."""

    host_path: Path = attrs.field(converter=check.host_path)
    tag: str = attrs.field()
    guest_path: str = attrs.field(converter=check.guest_path)
    symlinks: SymlinkPolicy = attrs.field(default=SymlinkPolicy.OPAQUE, kw_only=True)
    readonly: bool = attrs.field(default=False, kw_only=True)

    @tag.validator
    def _check_tag(self, field: object, value: object) -> None:
        # 36 bytes is the tag field of a virtio-fs device.
        if not isinstance(value, str) or not 0 < len(value.encode()) <= 36 or "\0" in value:
            raise ConfigError(f"tag must be 1 to 36 bytes of text, not {value!r}")

    @symlinks.validator
    def _check_symlinks(self, field: object, value: object) -> None:
        if not isinstance(value, SymlinkPolicy):
            raise ConfigError(f"symlinks must be a SymlinkPolicy, not {value!r}")

    @readonly.validator
    def _check_readonly(self, field: object, value: object) -> None:
        check.boolean("readonly", value)


def _mount_tuple(values: Iterable[MountSpec]) -> tuple[MountSpec, ...]:
    mounts = tuple(values)
    for mount in mounts:
        if not isinstance(mount, MountSpec):
            raise ConfigError(f"a mount must be a MountSpec, not {mount!r}")
    return mounts


def _device_tuple(
    values: Iterable[Callable[[], VirtioDevice]],
) -> tuple[Callable[[], VirtioDevice], ...]:
    devices = tuple(values)
    if len(devices) > MAX_DEVICES:
        raise ConfigError(f"{len(devices)} devices; the most is {MAX_DEVICES}")
    for make in devices:
        if not callable(make):
            raise ConfigError(f"a device is a class, or a function that makes one, not {make!r}")
    return devices


def _boolean(instance: object, field: attrs.Attribute[Any], value: object) -> None:
    check.boolean(field.name, value)


def _policy(value: EgressPolicy | str | None) -> EgressPolicy | None:
    if isinstance(value, str):
        return EgressPolicy.parse(value)
    if value is not None and not isinstance(value, EgressPolicy):
        raise ConfigError(f"egress must be an EgressPolicy, not {value!r}")
    return value


def _seconds(instance: object, field: attrs.Attribute[Any], value: object) -> None:
    check.seconds(field.name, value)


@public
@attrs.frozen(kw_only=True)
class VmConfig:
    """How to start a VM; frozen, and each ``with_*`` method returns a changed copy.

    :raises ConfigError: a value makes no sense.
    """

    #: Guest memory in MiB, at least 32; ``None`` is the image's baked value, or 256.
    memory_mib: int | None = attrs.field(default=None)
    #: Virtual CPUs, 1 to 16; ``None`` is the image's baked value, or 1.
    vcpus: int | None = attrs.field(default=None)
    #: Whether the host can take memory back from the running guest.
    balloon: bool = attrs.field(default=False, validator=_boolean)
    volumes: tuple[VolumeSpec, ...] = attrs.field(default=(), converter=volume_tuple)
    mounts: tuple[MountSpec, ...] = attrs.field(default=(), converter=_mount_tuple)
    #: Kernel, initramfs and engine program; ``None`` finds them.
    assets: AssetPaths | None = attrs.field(default=None)
    #: Where the VM's unix sockets are made as it starts; ``None`` makes them where nobody else
    #: gets, when they are asked for.
    vsock_mux_dir: Path | None = attrs.field(
        default=None, converter=attrs.converters.optional(check.host_path)
    )
    #: Seconds from the start of a boot until the guest must have answered.
    start_timeout: float = attrs.field(default=60.0, validator=_seconds)
    #: Seconds from the start of a restore until the guest must have answered.
    restore_timeout: float = attrs.field(default=10.0, validator=_seconds)
    #: ``"auto"``, ``"qemu"`` or ``"kvm"``.
    engine: EngineName = attrs.field(default="auto")
    #: Make virtio devices of the caller's own, at most 8; on the KVM engine. A VM that has any
    #: boots, and cannot be captured.
    devices: tuple[Callable[[], VirtioDevice], ...] = attrs.field(
        default=(), converter=_device_tuple
    )
    #: What the guest may reach, also as a text for :meth:`EgressPolicy.parse`; ``None`` is
    #: ``deny_private``.
    egress: EgressPolicy | None = attrs.field(default=None, converter=_policy)
    #: Refuse to boot where no snapshot can be restored.
    require_restore: bool = attrs.field(default=False, validator=_boolean)
    #: The guest's host name; ``None`` leaves the choice to the library.
    hostname: str | None = attrs.field(default=None)

    @memory_mib.validator
    def _check_memory(self, field: object, value: object) -> None:
        if value is not None:
            check.integer("memory_mib", value, MIN_MEMORY_MIB)

    @vcpus.validator
    def _check_vcpus(self, field: object, value: object) -> None:
        if value is not None:
            check.integer("vcpus", value, 1, MAX_VCPUS)

    @assets.validator
    def _check_assets(self, field: object, value: object) -> None:
        if value is not None and not isinstance(value, AssetPaths):
            raise ConfigError(f"assets must be an AssetPaths, not {value!r}")

    @vsock_mux_dir.validator
    def _check_vsock_mux_dir(self, field: object, value: Path | None) -> None:
        if value is not None:
            check.socket_directory(value)

    @engine.validator
    def _check_engine(self, field: object, value: object) -> None:
        if value not in get_args(EngineName):
            raise ConfigError(f"engine must be one of {get_args(EngineName)}, not {value!r}")

    @hostname.validator
    def _check_hostname(self, field: object, value: object) -> None:
        if value is None:
            return
        if not isinstance(value, str) or not _HOSTNAME.fullmatch(value):
            raise ConfigError(
                f"hostname must be up to 64 letters, digits, hyphens and dots, not {value!r}"
            )

    def with_memory_mib(self, memory_mib: int | None) -> VmConfig:
        """A copy with this much guest memory, in MiB."""
        return attrs.evolve(self, memory_mib=memory_mib)

    def with_vcpus(self, vcpus: int | None) -> VmConfig:
        """A copy with this many virtual CPUs."""
        return attrs.evolve(self, vcpus=vcpus)

    def with_balloon(self, enabled: bool = True) -> VmConfig:
        """A copy with a memory balloon, or without."""
        return attrs.evolve(self, balloon=enabled)

    def with_volume(self, volume: VolumeSpec) -> VmConfig:
        """A copy with one more volume."""
        return attrs.evolve(self, volumes=(*self.volumes, volume))

    def with_virtiofs(self, mount: MountSpec) -> VmConfig:
        """A copy with one more mounted host directory."""
        return attrs.evolve(self, mounts=(*self.mounts, mount))

    def with_device(self, make: Callable[[], VirtioDevice]) -> VmConfig:
        """A copy with one more virtio device, which ``make()`` makes for each VM."""
        return attrs.evolve(self, devices=(*self.devices, make))

    def with_assets(self, assets: AssetPaths | None) -> VmConfig:
        """A copy that uses this kernel, initramfs and engine program."""
        return attrs.evolve(self, assets=assets)

    def with_vsock_mux_dir(self, path: StrPath | None) -> VmConfig:
        """A copy whose unix sockets are made in the directory ``path``."""
        return attrs.evolve(self, vsock_mux_dir=path)

    def with_egress(self, policy: EgressPolicy | str | None) -> VmConfig:
        """A copy whose guest may reach this."""
        return attrs.evolve(self, egress=policy)

    def with_start_timeout(self, seconds: float) -> VmConfig:
        """A copy with this limit on a boot."""
        return attrs.evolve(self, start_timeout=seconds)

    def with_restore_timeout(self, seconds: float) -> VmConfig:
        """A copy with this limit on a restore."""
        return attrs.evolve(self, restore_timeout=seconds)

    def with_engine(self, engine: EngineName) -> VmConfig:
        """A copy that starts on this engine."""
        return attrs.evolve(self, engine=engine)

    def with_hostname(self, hostname: str | None) -> VmConfig:
        """A copy with this host name in the guest."""
        return attrs.evolve(self, hostname=hostname)

    @property
    def effective_memory_mib(self) -> int:
        """The memory of an image without a baked value."""
        return DEFAULT_MEMORY_MIB if self.memory_mib is None else self.memory_mib

    @property
    def effective_vcpus(self) -> int:
        """The number of vCPUs of an image without a baked value."""
        return DEFAULT_VCPUS if self.vcpus is None else self.vcpus


def refuse_unbuilt(config: VmConfig) -> None:
    """Refuse what this version cannot do yet, so that nothing asked for is ignored.

    :raises NotSupported: its ``feature`` is the name of the first such field.
    """
    for feature, asked in (
        ("volumes", bool(config.volumes)),
        ("mounts", bool(config.mounts)),
        ("balloon", config.balloon),
    ):
        if asked:
            raise NotSupported(feature)
