"""The configuration of a VM, and the host directories that it mounts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Final, get_args

import attrs

from .._public import public
from .._util import validators as check
from .._util.validators import StrPath
from ..devices.virtio import VirtioDevice
from ..errors import ConfigError, NotSupported
from ..host.assets import AssetPaths
from ..net.policy import EgressPolicy
from .checks import boolean, instance, instances, optional_integer, optional_path, seconds
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
    """Treatments of symbolic links in a mounted host directory.

    With ``OPAQUE`` the guest sees the link and resolves it among its own files; the host never
    follows one.
    """

    OPAQUE = "opaque"


@public
@attrs.frozen
class MountSpec:
    """A host directory that the guest mounts (refused by this version: :exc:`NotSupported`).

    :ivar host_path: the directory.
    :ivar tag: the name of its virtio-fs device, 1 to 36 bytes of text.
    :ivar guest_path: the absolute path at which the guest sees it.
    :ivar symlinks: the treatment of symbolic links in it.
    :ivar readonly: the guest cannot write to it.
    :raises ConfigError: a value makes no sense.
    """

    host_path: Path = attrs.field(converter=check.host_path)
    tag: str = attrs.field()
    guest_path: str = attrs.field(converter=check.guest_path)
    symlinks: SymlinkPolicy = attrs.field(
        default=SymlinkPolicy.OPAQUE,
        validator=instance(SymlinkPolicy, "a SymlinkPolicy"),
        kw_only=True,
    )
    readonly: bool = attrs.field(default=False, validator=boolean, kw_only=True)

    @tag.validator
    def _check_tag(self, field: object, value: object) -> None:
        # virtio 1.2, 5.11.4: a virtio-fs device has a tag of 36 bytes.
        if not isinstance(value, str) or not 0 < len(value.encode()) <= 36 or "\0" in value:
            raise ConfigError(f"tag must be 1 to 36 bytes of text, not {value!r}")


def _mount_tuple(values: Iterable[MountSpec]) -> tuple[MountSpec, ...]:
    return instances(values, MountSpec, "a mount", "a MountSpec")


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


def _policy(value: EgressPolicy | str | None) -> EgressPolicy | None:
    if isinstance(value, str):
        return EgressPolicy.parse(value)
    if value is not None and not isinstance(value, EgressPolicy):
        raise ConfigError(f"egress must be an EgressPolicy, not {value!r}")
    return value


@public
@attrs.frozen(kw_only=True)
class VmConfig:
    """The configuration of a VM. It never changes: each ``with_*`` method gives a changed copy.

    :ivar memory_mib: guest memory in MiB, at least 32; the stock kernel needs about 72. ``None`` is
        the image's baked value, or 256.
    :ivar vcpus: virtual CPUs, 1 to 16; ``None`` is the image's baked value, or 1.
    :ivar balloon: the host can take memory back from the running guest (refused by this version:
        :exc:`NotSupported`).
    :ivar volumes: writable disks that outlive the VM (refused by this version:
        :exc:`NotSupported`).
    :ivar mounts: host directories that the guest mounts (refused by this version:
        :exc:`NotSupported`).
    :ivar assets: kernel, initramfs and engine program; ``None`` finds them.
    :ivar vsock_mux_dir: the directory in which the VM's unix sockets are made as it starts;
        ``None`` makes them when they are asked for, in a private directory.
    :ivar start_timeout: seconds from the start of a boot until the guest must have answered.
    :ivar restore_timeout: seconds from the start of a restore until the guest must have answered.
    :ivar engine: ``"auto"``, ``"qemu"`` or ``"kvm"``.
    :ivar devices: functions or classes, at most 8, each of which makes a virtio device of the
        caller's own for each VM; on the KVM engine. A VM with any boots, and cannot be captured.
    :ivar egress: what the guest may reach: a policy, or text for :meth:`EgressPolicy.parse`;
        ``None`` is ``deny_private``.
    :ivar require_restore: refuse to boot where no snapshot can be restored.
    :ivar hostname: the guest's host name, up to 64 letters, digits, hyphens and dots; ``None``
        leaves the choice to the library.
    :raises ConfigError: a value makes no sense.

    Example::

        from trio_supermachine import Vm, VmConfig

        config = VmConfig(memory_mib=512, egress="deny_all").with_hostname("worker")
        async with Vm.start(image, config) as vm:
            await vm.run_process(["hostname"])
    """

    memory_mib: int | None = attrs.field(default=None, validator=optional_integer(MIN_MEMORY_MIB))
    vcpus: int | None = attrs.field(default=None, validator=optional_integer(1, MAX_VCPUS))
    balloon: bool = attrs.field(default=False, validator=boolean)
    volumes: tuple[VolumeSpec, ...] = attrs.field(default=(), converter=volume_tuple)
    mounts: tuple[MountSpec, ...] = attrs.field(default=(), converter=_mount_tuple)
    assets: AssetPaths | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(instance(AssetPaths, "an AssetPaths")),
    )
    vsock_mux_dir: Path | None = attrs.field(default=None, converter=optional_path)
    start_timeout: float = attrs.field(default=60.0, validator=seconds)
    restore_timeout: float = attrs.field(default=10.0, validator=seconds)
    engine: EngineName = attrs.field(default="auto")
    devices: tuple[Callable[[], VirtioDevice], ...] = attrs.field(
        default=(), converter=_device_tuple
    )
    egress: EgressPolicy | None = attrs.field(default=None, converter=_policy)
    require_restore: bool = attrs.field(default=False, validator=boolean)
    hostname: str | None = attrs.field(default=None)

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
        """Give a copy with this much guest memory, in MiB."""
        return attrs.evolve(self, memory_mib=memory_mib)

    def with_vcpus(self, vcpus: int | None) -> VmConfig:
        """Give a copy with this many virtual CPUs."""
        return attrs.evolve(self, vcpus=vcpus)

    def with_balloon(self, enabled: bool = True) -> VmConfig:
        """Give a copy with a memory balloon, or without.

        A start with one is refused by this version: :exc:`NotSupported`.
        """
        return attrs.evolve(self, balloon=enabled)

    def with_volume(self, volume: VolumeSpec) -> VmConfig:
        """Give a copy with one more volume (refused by this version: :exc:`NotSupported`)."""
        return attrs.evolve(self, volumes=(*self.volumes, volume))

    def with_virtiofs(self, mount: MountSpec) -> VmConfig:
        """Give a copy with one more mounted host directory.

        A start with one is refused by this version: :exc:`NotSupported`.
        """
        return attrs.evolve(self, mounts=(*self.mounts, mount))

    def with_device(self, make: Callable[[], VirtioDevice]) -> VmConfig:
        """Give a copy with one more virtio device, which ``make()`` gives for each VM."""
        return attrs.evolve(self, devices=(*self.devices, make))

    def with_assets(self, assets: AssetPaths | None) -> VmConfig:
        """Give a copy that uses this kernel, initramfs and engine program."""
        return attrs.evolve(self, assets=assets)

    def with_vsock_mux_dir(self, path: StrPath | None) -> VmConfig:
        """Give a copy whose unix sockets are made in the directory ``path``."""
        return attrs.evolve(self, vsock_mux_dir=path)

    def with_egress(self, policy: EgressPolicy | str | None) -> VmConfig:
        """Give a copy with this policy of what the guest may reach."""
        return attrs.evolve(self, egress=policy)

    def with_start_timeout(self, seconds: float) -> VmConfig:
        """Give a copy with this limit on a boot, in seconds."""
        return attrs.evolve(self, start_timeout=seconds)

    def with_restore_timeout(self, seconds: float) -> VmConfig:
        """Give a copy with this limit on a restore, in seconds."""
        return attrs.evolve(self, restore_timeout=seconds)

    def with_engine(self, engine: EngineName) -> VmConfig:
        """Give a copy that starts on this engine."""
        return attrs.evolve(self, engine=engine)

    def with_hostname(self, hostname: str | None) -> VmConfig:
        """Give a copy with this host name in the guest."""
        return attrs.evolve(self, hostname=hostname)

    @property
    def effective_memory_mib(self) -> int:
        """The memory of a VM whose image has no baked value, in MiB."""
        return DEFAULT_MEMORY_MIB if self.memory_mib is None else self.memory_mib

    @property
    def effective_vcpus(self) -> int:
        """The number of vCPUs of a VM whose image has no baked value."""
        return DEFAULT_VCPUS if self.vcpus is None else self.vcpus


def refuse_unbuilt(config: VmConfig) -> None:
    """Refuse a configuration that this version cannot carry out, so that nothing is ignored.

    :raises NotSupported: its ``feature`` is the name of the first such field.
    """
    for feature, asked in (
        ("volumes", bool(config.volumes)),
        ("mounts", bool(config.mounts)),
        ("balloon", config.balloon),
    ):
        if asked:
            raise NotSupported(feature)
