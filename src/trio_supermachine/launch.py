"""How a machine comes to answer: booted from its image, or restored from a snapshot."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, Literal

import attrs
import trio

from .agent import greeting
from .agent.client import AgentClient
from .assets import find_initramfs, find_kernel
from .config import VmConfig
from .errors import (
    ImageNotFound,
    RestoreTimeout,
    SnapshotIncompatible,
    SnapshotInvalid,
    StartTimeout,
)
from .hv.base import Disk, Engine, MachineSpec, Restore
from .hv.select import choose_engine
from .kernels import prepare_kernel
from .limits import memory_admission, spawn_concurrency
from .net.network import VmNetwork
from .net.policy import EgressPolicy
from .trace import trace

if TYPE_CHECKING:
    from .images.image import Image
    from .snapshots import Snapshot

_DEFAULT_HOSTNAME: Final = "supermachine"
_CONSOLE_TAIL: Final = 4096
_SEED: Final = 64  # bytes of entropy


@attrs.frozen(kw_only=True)
class KernelFacts:
    """The kernel that a machine runs: SHA-256 digests in hexadecimal, and the release."""

    kernel: str
    initramfs: str
    release: str


@attrs.frozen(kw_only=True)
class Plan:
    """What is to be started: the machine, and what is told to its guest.

    :ivar source: the snapshot that it is restored from, if it is.
    """

    engine: Engine
    spec: MachineSpec
    hostname: str
    kernel: KernelFacts
    workload: tuple[str, ...]
    source: Snapshot | None = None

    @property
    def started_by(self) -> Literal["boot", "restore"]:
        """What :attr:`Vm.started_by` says."""
        return "boot" if self.source is None else "restore"


async def plan(image: Image, config: VmConfig, *, workload: bool = True) -> Plan:
    """Decide between a restore and a boot, and on which machine.

    :raises SnapshotIncompatible: the snapshot is another engine's or host's, or ``config``
        requires a restore and does not agree with the snapshot.
    :raises SnapshotInvalid: ``config`` requires a restore, and the image has no snapshot.
    """
    config.refuse_unbuilt()
    snapshot = image.snapshot
    if snapshot is None:
        if config.require_restore:
            raise SnapshotInvalid(image.reference, "the image has no snapshot; bake it first")
        return await _plan_boot(image, config, workload)
    why_not = _disagreement(image, snapshot, config, workload)
    if why_not is None:
        return await _plan_restore(image, snapshot, config)
    if config.require_restore:
        reason = f"the configuration has {why_not}; leave that out, or bake with it"
        raise SnapshotIncompatible(str(snapshot.directory), reason)
    trace("vm", "%r boots: the configuration has %s", image.reference, why_not)
    return await _plan_boot(image, config, workload)


def _disagreement(image: Image, snapshot: Snapshot, config: VmConfig, workload: bool) -> str | None:
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
    if image.config.argv and not workload:
        return "no workload"
    return None


async def _plan_boot(image: Image, config: VmConfig, workload: bool) -> Plan:
    name = config.engine if config.engine != "auto" else image.engine
    engine = await choose_engine(name, config.assets)
    boot = await prepare_kernel(config.assets)
    spec = MachineSpec(
        kernel=boot.kernel,
        initramfs=boot.initramfs,
        memory_mib=config.memory_mib or image.memory_mib or config.effective_memory_mib,
        vcpus=config.vcpus or image.vcpus or config.effective_vcpus,
        disks=tuple(Disk(path=layer) for layer in image.layers),
        devices=config.devices,
    )
    kernel = KernelFacts(
        kernel=boot.kernel_digest.removeprefix("sha256:"),
        initramfs=boot.initramfs_digest.removeprefix("sha256:"),
        release=boot.release,
    )
    return Plan(
        engine=engine,
        spec=spec,
        hostname=config.hostname or _DEFAULT_HOSTNAME,
        kernel=kernel,
        workload=tuple(image.config.argv) if workload else (),
    )


async def _plan_restore(image: Image, snapshot: Snapshot, config: VmConfig) -> Plan:
    metadata = snapshot.metadata
    engine = await choose_engine(metadata.engine, config.assets)
    here = await engine.host_facts()
    for fact, there in metadata.host.items():
        if here.get(fact) != there:
            reason = f"it needs {fact} {there!r}, and here is {here.get(fact)!r}"
            raise SnapshotIncompatible(
                str(snapshot.directory), f"{reason}; bake the image on this host"
            )
    spec = MachineSpec(
        memory_mib=metadata.memory_mib,
        vcpus=metadata.vcpus,
        disks=tuple(Disk(path=layer) for layer in image.layers),
        restore=Restore(
            identity=snapshot.identity,
            state=snapshot.state,
            memory=snapshot.memory.root,
            patches=snapshot.memory.patches,
        ),
    )
    kernel = KernelFacts(
        kernel=metadata.kernel, initramfs=metadata.initramfs, release=metadata.kernel_release
    )
    return Plan(
        engine=engine,
        spec=spec,
        hostname=config.hostname or metadata.hostname,
        kernel=kernel,
        workload=(),
        source=snapshot,
    )


@asynccontextmanager
async def launched(
    plan: Plan, image: Image, config: VmConfig
) -> AsyncIterator[tuple[AgentClient, VmNetwork]]:
    """Start the machine of ``plan``: entered when its guest has answered.

    Waits, in order, until its memory is admitted and a start is due.

    :raises AdmissionRefused: its memory can never be admitted.
    :raises StartTimeout: a booted guest did not answer within ``config.start_timeout``.
    :raises RestoreTimeout: a restored one did not within ``config.restore_timeout``.
    :raises VmExited: the guest ended before it answered.
    :raises ImageNotFound: a layer was removed since the image was prepared.
    :raises SnapshotInvalid: a file was removed since, or the engine cannot load the state.
    """
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(memory_admission.admit(plan.spec.memory_mib))
        async with spawn_concurrency:
            trace("vm", "%s %r on %s: %r", plan.started_by, image, plan.engine.name, plan.spec)
            try:
                machine = await stack.enter_async_context(plan.engine.open(plan.spec))
            except FileNotFoundError as exc:
                if str(exc.filename) not in _files(plan.spec):
                    raise
                # It was removed since it was verified.
                raise _removed(exc.filename, plan, image) from exc
            client = AgentClient(machine)
            policy = config.egress or EgressPolicy.deny_private()
            network = VmNetwork(client, policy, config.vsock_mux_dir)
            stack.push_async_callback(client.aclose)
            if plan.source is None:
                with trio.move_on_after(config.start_timeout) as scope:
                    await _set_up(client, plan, image)
                if scope.cancelled_caught:
                    raise await _start_timeout(plan, config, _console(client))
            else:
                await machine.resume()
                with trio.move_on_after(config.restore_timeout) as scope:
                    await client.restored(_renewal(config.hostname))
                if scope.cancelled_caught:
                    raise RestoreTimeout(config.restore_timeout, console=_console(client))
        yield client, network


def _files(spec: MachineSpec) -> set[str]:
    """The files that a machine is made of."""
    files = {spec.kernel, spec.initramfs, *(disk.path for disk in spec.disks)}
    if spec.restore is not None:
        patches = (patch.file for patch in spec.restore.patches)
        files |= {spec.restore.state, spec.restore.memory, *patches}
    return {str(file) for file in files if file is not None}


def _removed(name: str, plan: Plan, image: Image) -> Exception:
    if plan.source is None:
        return ImageNotFound(image.reference, f"{name} was removed; prepare the image again")
    return SnapshotInvalid(name, "it was removed; bake the image or take the snapshot again")


async def _set_up(client: AgentClient, plan: Plan, image: Image) -> None:
    await client.set_up(
        greeting.Setup(
            seed=secrets.token_bytes(_SEED),
            hostname=plan.hostname,
            layers=len(plan.spec.disks),
            environment=image.config.env,
            workdir=image.config.workdir,
            user=image.config.user,
            workload=plan.workload,
            stop_signal=image.config.stop_signal,
        )
    )


def _renewal(hostname: str | None) -> greeting.Restore:
    return greeting.Restore(
        seed=secrets.token_bytes(_SEED),
        hostname=hostname or "",
        machine_id=secrets.token_hex(16),
        boot_id=str(uuid.uuid4()),
    )


def _console(client: AgentClient) -> str:
    return client.machine.console.tail(_CONSOLE_TAIL).decode("utf-8", "replace")


async def _start_timeout(plan: Plan, config: VmConfig, console: str) -> StartTimeout:
    """The error for a guest that did not answer; it explains one that said nothing, too."""
    if console.strip():
        return StartTimeout(config.start_timeout, console=console)
    spec = plan.spec
    assert spec.initramfs is not None
    engine = await plan.engine.probe()
    if find_kernel(config.assets) or find_initramfs(config.assets):
        other = "do without the kernel or initramfs that AssetPaths or the environment names"
    else:
        other = "another kernel, by `trio-supermachine kernel build`"
    detail = (
        "its console is empty: the firmware or the first steps of the kernel hang, or the host is"
        f" very slow. It was on {engine.detail}, with {spec.memory_mib} MiB of memory, the kernel"
        f" {spec.kernel} ({plan.kernel.release}) and the initramfs {spec.initramfs}"
        f" ({spec.initramfs.stat().st_size} bytes). To try: `trio-supermachine doctor`; {other};"
        " a longer start_timeout"
    )
    return StartTimeout(config.start_timeout, console=console, detail=detail)
