"""A plan: everything about one start that is decided before it.

The engine, the kernel, the host's facts and the layers are looked up here, once. A bake takes its
fingerprint from the plan and starts that plan; a start carries it out; a capture writes it down.
So what is stored under a fingerprint is what ran, whatever is published meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import attrs

from .._util.progress import ProgressCallback
from .._util.trace import trace
from ..config.vm import VmConfig, refuse_unbuilt
from ..errors import SnapshotIncompatible, SnapshotInvalid
from ..hv.base import Disk, Engine, MachineSpec, Restore
from ..hv.select import choose_engine
from ..images.spec import ImageSpec
from ..kernels import prepare_kernel
from ..snapshots import Snapshot, layer_refs
from ..snapshots.metadata import LayerRef

_DEFAULT_HOSTNAME: Final = "supermachine"


@attrs.frozen(kw_only=True)
class KernelFacts:
    """The kernel that a machine runs: SHA-256 digests in hexadecimal, and the release."""

    kernel: str
    initramfs: str
    release: str


@attrs.frozen(kw_only=True)
class Plan:
    """One start, decided: the engine, the machine, and what its guest is told.

    :ivar host: the engine's facts about this host, on which a snapshot depends.
    :ivar layers: the files of the image's layers with their digests; ``None`` until they are read.
    :ivar workload: the command of the workload that the guest starts; empty if it starts none, or
        has started it before it was captured.
    :ivar source: the snapshot that the machine is restored from; ``None`` for a boot.
    :ivar ends_programs: kill the programs of a restored guest, its workload among them, before
        they run again.
    """

    image: ImageSpec
    config: VmConfig
    engine: Engine
    host: Mapping[str, str]
    spec: MachineSpec
    layers: tuple[LayerRef, ...] | None
    hostname: str
    kernel: KernelFacts
    workload: tuple[str, ...] = ()
    source: Snapshot | None = None
    ends_programs: bool = False

    @property
    def started_by(self) -> Literal["boot", "restore"]:
        """The value of :attr:`Vm.started_by`."""
        return "boot" if self.source is None else "restore"


async def plan_start(image: ImageSpec, config: VmConfig, *, workload: bool = True) -> Plan:
    """Plan a restore if the image has a snapshot that suits ``config``, and else a boot.

    :raises SnapshotIncompatible: another engine or host made the snapshot, or ``config`` requires a
        restore and needs other hardware than the snapshot has.
    :raises SnapshotInvalid: ``config`` requires a restore, and the image has no snapshot.
    """
    refuse_unbuilt(config)
    snapshot = image.snapshot
    if snapshot is None:
        if config.require_restore:
            raise SnapshotInvalid(image.reference, "the image has no snapshot; bake it first")
        return await plan_boot(image, config, workload=workload)
    difference = _difference(snapshot, config)
    if difference is None:
        return await _plan_restore(image, snapshot, config, workload=workload)
    if config.require_restore:
        reason = f"the configuration has {difference}; leave that out, or bake with it"
        raise SnapshotIncompatible(str(snapshot.directory), reason)
    trace("vm", "%r boots: the configuration has %s", image.reference, difference)
    return await plan_boot(image, config, workload=workload)


async def plan_boot(
    image: ImageSpec,
    config: VmConfig,
    *,
    workload: bool = True,
    for_capture: bool = False,
    progress: ProgressCallback | None = None,
) -> Plan:
    """Plan a boot. A kernel that is not here is fetched first, which ``progress`` hears of.

    :param for_capture: read the layers now, as a fingerprint and a capture need their digests.
    """
    name = config.engine if config.engine != "auto" else image.engine
    engine = await choose_engine(name, config.assets)
    boot = await prepare_kernel(config.assets, progress=progress)
    return Plan(
        image=image,
        config=config,
        engine=engine,
        host=await engine.host_facts(),
        spec=MachineSpec(
            kernel=boot.kernel,
            initramfs=boot.initramfs,
            memory_mib=config.memory_mib or image.memory_mib or config.effective_memory_mib,
            vcpus=config.vcpus or image.vcpus or config.effective_vcpus,
            disks=tuple(Disk(path=layer) for layer in image.layers),
            devices=config.devices,
        ),
        layers=await layer_refs(image.layers) if for_capture else None,
        hostname=config.hostname or _DEFAULT_HOSTNAME,
        kernel=KernelFacts(
            kernel=boot.kernel_digest.removeprefix("sha256:"),
            initramfs=boot.initramfs_digest.removeprefix("sha256:"),
            release=boot.release,
        ),
        workload=tuple(image.config.argv) if workload else (),
    )


async def plan_going_on(plan: Plan, snapshot: Snapshot) -> Plan:
    """Plan a restore in the place of a boot: from a snapshot that was made by the same plan."""
    return await _plan_restore(plan.image, snapshot, plan.config, workload=False)


def _difference(snapshot: Snapshot, config: VmConfig) -> str | None:
    """Tell what a start needs that the snapshot does not have; ``None`` if a restore will do."""
    metadata = snapshot.metadata
    if config.engine not in ("auto", metadata.engine):
        reason = f"it was made on the engine {metadata.engine!r}, not {config.engine!r}"
        raise SnapshotIncompatible(str(snapshot.directory), f"{reason}; bake the image there")
    if config.memory_mib not in (None, metadata.memory_mib):
        return f"{config.memory_mib} MiB of memory, not {metadata.memory_mib}"
    if config.vcpus not in (None, metadata.vcpus):
        return f"{config.vcpus} vCPUs, not {metadata.vcpus}"
    if config.devices:
        return "devices of its own"
    if config.assets is not None and (config.assets.kernel or config.assets.initramfs):
        return "a kernel of its own"
    return None


async def _plan_restore(
    image: ImageSpec, snapshot: Snapshot, config: VmConfig, *, workload: bool
) -> Plan:
    metadata = snapshot.metadata
    engine = await choose_engine(metadata.engine, config.assets)
    host = await engine.host_facts()
    for fact, there in metadata.host.items():
        if host.get(fact) != there:
            reason = f"it needs {fact} {there!r}, and here is {host.get(fact)!r}"
            raise SnapshotIncompatible(
                str(snapshot.directory), f"{reason}; bake the image on this host"
            )
    return Plan(
        image=image,
        config=config,
        engine=engine,
        host=host,
        spec=MachineSpec(
            memory_mib=metadata.memory_mib,
            vcpus=metadata.vcpus,
            disks=tuple(Disk(path=layer) for layer in image.layers),
            restore=Restore(
                identity=snapshot.identity,
                state=snapshot.state,
                memory=snapshot.memory.root,
                patches=snapshot.memory.patches,
            ),
        ),
        layers=metadata.layers,
        hostname=config.hostname or metadata.hostname,
        kernel=KernelFacts(
            kernel=metadata.kernel,
            initramfs=metadata.initramfs,
            release=metadata.kernel_release,
        ),
        workload=tuple(image.config.argv) if workload and not metadata.workload_started else (),
        source=snapshot,
        ends_programs=metadata.workload_started and not workload,
    )
