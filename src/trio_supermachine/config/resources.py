"""Low-level descriptions of virtual machines, as values with types.

:class:`VmResources` says what one machine is made of, for programs that bring their own kernel
and disks. Programs that start images want :class:`VmConfig` instead. Values are frozen; each
``with_*`` method returns a changed copy.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Final

import attrs

from .._public import public
from .._util import validators as check
from .._util.validators import StrPath
from ..errors import ConfigError, ResourceError, ResourceErrorKind
from .checks import boolean, instances, integer, optional_integer, optional_path
from .defaults import DEFAULT_MEMORY_MIB, DEFAULT_VCPUS

DEFAULT_CMDLINE: Final = "console=ttyAMA0 reboot=t panic=-1"
"""The default kernel command line of arm64 guests."""

_X86_CMDLINE: Final = "console=ttyS0 reboot=t panic=-1"

DEFAULT_EXEC_GUEST_PORT: Final = 1028
"""The vsock port on which the guest's agent listens."""


_MAX_PORT: Final = 2**32 - 2  # the highest vsock port; 2**32 - 1 means "any"


def default_cmdline(machine: str | None = None) -> str:
    """Give the default command line of a machine.

    :param machine: its architecture, as ``uname -m`` says it; ``None`` is this host's.
    """
    arm = (machine or platform.machine()) in ("aarch64", "arm64")
    return DEFAULT_CMDLINE if arm else _X86_CMDLINE


@public
class VmProfile(Enum):
    """Profiles that a machine is tuned for.

    ``LATENCY`` stands for one vCPU, ``THROUGHPUT`` for four.
    """

    LATENCY = "latency"
    THROUGHPUT = "throughput"

    @classmethod
    def parse(cls, text: str) -> VmProfile | None:
        """Read a profile's name.

        :param text: ``"latency"``, ``"low-latency"`` or ``"throughput"``; anything else gives
            ``None``.
        """
        if text in ("latency", "low-latency"):
            return cls.LATENCY
        if text == "throughput":
            return cls.THROUGHPUT
        return None

    @property
    def default_vcpus(self) -> int:
        """The number of vCPUs that this profile stands for."""
        return 4 if self is VmProfile.THROUGHPUT else DEFAULT_VCPUS


@public
@attrs.frozen
class VolumeSpec:
    """A writable disk that outlives its machines.

    :ivar host_path: a sparse file of the host. The first use makes it, with an ext4 file system;
        later ones find what was written.
    :ivar guest_path: the absolute path at which the guest sees it mounted.
    :ivar size_bytes: its size in bytes, at least 1.
    """

    host_path: Path = attrs.field(converter=check.host_path)
    guest_path: str = attrs.field(converter=check.guest_path)
    size_bytes: int = attrs.field(default=1 << 30, validator=integer(1))

    def with_size_bytes(self, size_bytes: int) -> VolumeSpec:
        """Give a copy of another size, in bytes."""
        return attrs.evolve(self, size_bytes=size_bytes)


def volume_tuple(values: Iterable[VolumeSpec]) -> tuple[VolumeSpec, ...]:
    """Convert volumes to a tuple. :raises ConfigError: a value is no volume."""
    return instances(values, VolumeSpec, "a volume", "a VolumeSpec")


@public
@attrs.frozen(kw_only=True)
class SnapshotResources:
    """Triggers of a machine's capture, and its place. Any trigger needs :attr:`out_path`.

    :ivar after_ms: milliseconds after the start.
    :ivar at_heartbeat: the number of a heartbeat of the guest, counted from 1.
    :ivar on_listener: capture when the workload listens on a TCP port.
    :ivar quiesce_ms: milliseconds between a trigger and the capture.
    :ivar out_path: the directory that the snapshot becomes.
    """

    after_ms: int | None = attrs.field(default=None, validator=optional_integer(0))
    at_heartbeat: int | None = attrs.field(default=None, validator=optional_integer(0))
    on_listener: bool = attrs.field(default=False, validator=boolean)
    quiesce_ms: int = attrs.field(default=0, validator=integer(0))
    out_path: Path | None = attrs.field(default=None, converter=optional_path)

    @property
    def has_trigger(self) -> bool:
        """Whether any trigger is set."""
        return self.after_ms is not None or self.at_heartbeat is not None or self.on_listener


@public
@attrs.frozen(kw_only=True)
class EndpointResources:
    """Unix sockets and ports of the host that lead into a machine.

    :ivar vsock_mux: the unix socket to the guest's TCP listeners.
    :ivar http_port: the TCP port of the host that leads to the guest's first listener.
    :ivar vsock_mux_handoff: the unix socket on which accepted connections are handed over.
    :ivar vsock_exec: the unix socket to the guest's agent.
    :ivar vsock_exec_guest_port: the agent's vsock port.
    """

    vsock_mux: Path | None = attrs.field(default=None, converter=optional_path)
    http_port: int | None = attrs.field(default=None, validator=optional_integer(0, 65535))
    vsock_mux_handoff: Path | None = attrs.field(default=None, converter=optional_path)
    vsock_exec: Path | None = attrs.field(default=None, converter=optional_path)
    vsock_exec_guest_port: int = attrs.field(
        default=DEFAULT_EXEC_GUEST_PORT, validator=integer(1, _MAX_PORT)
    )


@public
@attrs.frozen(kw_only=True)
class VmResources:
    """The parts of one virtual machine.

    Each value is checked by itself where it is written; :meth:`validate_for_run` checks that
    together they make a machine that can run.

    :ivar kernel_path: the kernel to boot.
    :ivar initrd_path: the initial file system.
    :ivar cmdline: the kernel's command line; the default names the console of this host's
        architecture.
    :ivar memory_mib: the guest's memory in MiB.
    :ivar vcpus: the number of virtual CPUs.
    :ivar profile: a profile for :meth:`apply_profile_defaults`.
    :ivar block_devices: read-only disks, in the order in which the guest sees them.
    :ivar volumes: writable disks.
    :ivar restore_from: the snapshot to start from instead of booting.
    :ivar cow_restore: map the snapshot's memory copy-on-write instead of reading it.
    :ivar snapshot: the triggers and the place of a capture.
    :ivar endpoints: unix sockets and ports of the host that lead into the machine.
    :ivar balloon_target_pages: pages of 4 KiB that a balloon takes from the guest.
    :raises ConfigError: a value makes no sense by itself.

    Example::

        from trio_supermachine import VmResources

        resources = VmResources.for_kernel("vmlinuz", "initrd.img").with_memory_mib(512)
        resources.validate_for_run()
    """

    kernel_path: Path | None = attrs.field(default=None, converter=optional_path)
    initrd_path: Path | None = attrs.field(default=None, converter=optional_path)
    cmdline: str = attrs.field(factory=default_cmdline, validator=attrs.validators.instance_of(str))
    memory_mib: int = attrs.field(default=DEFAULT_MEMORY_MIB, validator=integer(0))
    vcpus: int = attrs.field(default=DEFAULT_VCPUS, validator=integer(0))
    profile: VmProfile | None = attrs.field(default=None)
    block_devices: tuple[Path, ...] = attrs.field(default=(), converter=check.host_paths)
    volumes: tuple[VolumeSpec, ...] = attrs.field(default=(), converter=volume_tuple)
    restore_from: Path | None = attrs.field(default=None, converter=optional_path)
    cow_restore: bool = attrs.field(default=False, validator=boolean)
    snapshot: SnapshotResources = attrs.field(factory=SnapshotResources)
    endpoints: EndpointResources = attrs.field(factory=EndpointResources)
    balloon_target_pages: int | None = attrs.field(default=None, validator=optional_integer(0))

    @profile.validator
    def _check_profile(self, field: object, value: object) -> None:
        if value is not None and not isinstance(value, VmProfile):
            raise ConfigError(f"profile must be a VmProfile, not {value!r}; see VmProfile.parse")

    @classmethod
    def for_kernel(cls, kernel: StrPath, initrd: StrPath | None = None) -> VmResources:
        """Describe a machine that boots ``kernel``."""
        return cls(kernel_path=kernel, initrd_path=initrd)

    @classmethod
    def from_snapshot(cls, path: StrPath) -> VmResources:
        """Describe a machine that is restored from the snapshot at ``path``."""
        return cls(restore_from=path)

    def with_kernel_path(self, path: StrPath) -> VmResources:
        """Give a copy that boots the kernel at ``path``."""
        return attrs.evolve(self, kernel_path=path)

    def with_initramfs(self, path: StrPath) -> VmResources:
        """Give a copy with this initial file system."""
        return attrs.evolve(self, initrd_path=path)

    def with_cmdline(self, cmdline: str) -> VmResources:
        """Give a copy with this kernel command line, in place of the default."""
        return attrs.evolve(self, cmdline=cmdline)

    def with_memory_mib(self, memory_mib: int) -> VmResources:
        """Give a copy with this much memory, in MiB."""
        return attrs.evolve(self, memory_mib=memory_mib)

    def with_profile(self, profile: VmProfile) -> VmResources:
        """Give a copy with this profile, which :meth:`apply_profile_defaults` applies."""
        return attrs.evolve(self, profile=profile)

    def with_vcpus(self, vcpus: int) -> VmResources:
        """Give a copy with this many vCPUs."""
        return attrs.evolve(self, vcpus=vcpus)

    def with_block_device(self, path: StrPath) -> VmResources:
        """Give a copy with one more read-only disk."""
        return attrs.evolve(self, block_devices=(*self.block_devices, path))

    def with_volume(self, volume: VolumeSpec) -> VmResources:
        """Give a copy with one more volume."""
        return attrs.evolve(self, volumes=(*self.volumes, volume))

    def with_restore(self, path: StrPath) -> VmResources:
        """Give a copy that starts from the snapshot at ``path``."""
        return attrs.evolve(self, restore_from=path)

    def with_cow_restore(self, enabled: bool = True) -> VmResources:
        """Give a copy whose restore is copy-on-write, or not."""
        return attrs.evolve(self, cow_restore=enabled)

    def with_snapshot_after_ms(self, ms: int, out_path: StrPath | None = None) -> VmResources:
        """Give a copy that is captured ``ms`` milliseconds after its start.

        :param out_path: the snapshot's directory; ``None`` leaves it as it is.
        """
        return self._with_trigger(out_path, after_ms=ms)

    def with_snapshot_at_heartbeat(
        self, heartbeat: int, out_path: StrPath | None = None
    ) -> VmResources:
        """Give a copy that is captured at this heartbeat of the guest, counted from 1.

        :param out_path: the snapshot's directory; ``None`` leaves it as it is.
        """
        return self._with_trigger(out_path, at_heartbeat=heartbeat)

    def with_snapshot_on_listener(self, out_path: StrPath | None = None) -> VmResources:
        """Give a copy that is captured when its workload listens on a TCP port.

        :param out_path: the snapshot's directory; ``None`` leaves it as it is.
        """
        return self._with_trigger(out_path, on_listener=True)

    def with_quiesce_ms(self, ms: int) -> VmResources:
        """Give a copy that waits this many milliseconds between a trigger and the capture."""
        return attrs.evolve(self, snapshot=attrs.evolve(self.snapshot, quiesce_ms=ms))

    def with_vsock_mux(self, path: StrPath) -> VmResources:
        """Give a copy with a unix socket to the guest's listeners at ``path``."""
        return self._with_endpoint(vsock_mux=path)

    def with_http_port(self, port: int) -> VmResources:
        """Give a copy with this host port, which leads to the guest's first listener."""
        return self._with_endpoint(http_port=port)

    def with_vsock_mux_handoff(self, path: StrPath) -> VmResources:
        """Give a copy with a unix socket at ``path`` on which connections are handed over."""
        return self._with_endpoint(vsock_mux_handoff=path)

    def with_vsock_exec(self, path: StrPath) -> VmResources:
        """Give a copy with a unix socket to the guest's agent at ``path``."""
        return self._with_endpoint(vsock_exec=path)

    def with_vsock_exec_guest_port(self, port: int) -> VmResources:
        """Give a copy whose agent listens on this vsock port."""
        return self._with_endpoint(vsock_exec_guest_port=port)

    @property
    def memory_bytes(self) -> int:
        """The guest's memory in bytes."""
        return self.memory_mib << 20

    @property
    def is_restore(self) -> bool:
        """Whether the machine starts from a snapshot."""
        return self.restore_from is not None

    def apply_profile_defaults(self) -> VmResources:
        """Give a copy with the profile's number of vCPUs, if the number is still the default."""
        if self.profile is None or self.vcpus != DEFAULT_VCPUS:
            return self
        return attrs.evolve(self, vcpus=self.profile.default_vcpus)

    def validate_for_run(self) -> None:
        """Check that a machine can be made of this.

        :raises ResourceError: with the first :class:`ResourceErrorKind` that applies, in the order
            of its members.
        """
        if self.memory_mib == 0:
            raise ResourceError(
                ResourceErrorKind.ZERO_MEMORY, "memory_mib is 0; give the machine some memory"
            )
        if self.vcpus == 0:
            raise ResourceError(
                ResourceErrorKind.ZERO_VCPUS, "vcpus is 0; a machine needs at least one"
            )
        if self.kernel_path is None and not self.is_restore:
            raise ResourceError(
                ResourceErrorKind.MISSING_KERNEL,
                "there is neither a kernel to boot (with_kernel_path) nor a snapshot to restore"
                " (with_restore)",
            )
        if self.snapshot.has_trigger and self.snapshot.out_path is None:
            raise ResourceError(
                ResourceErrorKind.SNAPSHOT_TRIGGER_WITHOUT_OUTPUT,
                "a snapshot trigger is set, but no out_path for the snapshot",
            )

    def _with_trigger(self, out_path: StrPath | None, **trigger: Any) -> VmResources:
        if out_path is not None:
            trigger["out_path"] = out_path
        return attrs.evolve(self, snapshot=attrs.evolve(self.snapshot, **trigger))

    def _with_endpoint(self, **endpoint: Any) -> VmResources:
        return attrs.evolve(self, endpoints=attrs.evolve(self.endpoints, **endpoint))
