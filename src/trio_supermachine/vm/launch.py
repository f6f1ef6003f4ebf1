"""The way from a plan to a guest that answers.

A machine starts in this order, each step inside the one before, and all are undone in reverse:

1. Its memory is admitted (``memory_admission``), then it waits for its turn to start
   (``spawn_concurrency``). Both waits are in the order of arrival.
2. The engine opens the machine. A restored machine stands still.
3. The agent's client and the network listen. Whatever the guest dials first finds them.
4. A booted guest runs already; a restored one runs from here on.
5. The guest's agent opens the lifeline and says whether it was booted or restored. A booted guest
   is told what to be: its layers, its environment, its workload. A restored one is told its new
   random seed, clock and identity, and none of its programs runs before it has them.
6. The agent is ready. The place in ``spawn_concurrency`` is free again; the memory stays admitted
   until the machine is gone.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from .._util.trace import trace
from ..agent import greeting, wire
from ..agent.client import AgentClient
from ..errors import ImageNotFound, RestoreTimeout, SnapshotInvalid, StartTimeout
from ..host.assets import find_initramfs, find_kernel
from ..hv.base import MachineSpec
from ..net.network import VmNetwork
from ..net.policy import EgressPolicy
from .limits import memory_admission, spawn_concurrency
from .plan import Plan

_SEED: Final = 64  # bytes of entropy


@asynccontextmanager
async def launch(plan: Plan) -> AsyncIterator[tuple[AgentClient, VmNetwork]]:
    """Start the machine of ``plan``: a block, entered when its guest has answered.

    Cancelling it at any time ends the machine.

    :raises AdmissionRefused: its memory can never be admitted.
    :raises StartTimeout: a booted guest did not answer within ``config.start_timeout``.
    :raises RestoreTimeout: a restored one did not within ``config.restore_timeout``.
    :raises VmExited: the guest ended before it answered.
    :raises ImageNotFound: a layer was removed since the image was prepared.
    :raises SnapshotInvalid: a file was removed since, or the engine cannot load the state.
    """
    config = plan.config
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(memory_admission.admit(plan.spec.memory_mib))
        async with spawn_concurrency:
            trace("vm", "%s %r on %s: %r", plan.started_by, plan.image, plan.engine.name, plan.spec)
            try:
                machine = await stack.enter_async_context(plan.engine.open(plan.spec))
            except FileNotFoundError as exc:
                if str(exc.filename) not in _files(plan.spec):
                    raise
                # It was removed since it was verified.
                raise _removed(exc.filename, plan) from exc
            client = AgentClient(machine)
            policy = config.egress or EgressPolicy.deny_private()
            network = VmNetwork(client, policy, config.vsock_mux_dir)
            stack.push_async_callback(client.aclose)
            if plan.source is None:
                with trio.move_on_after(config.start_timeout) as scope:
                    await _set_up(client, plan)
                if scope.cancelled_caught:
                    raise await _start_timeout(plan, machine.console.text_tail())
            else:
                await machine.resume()
                with trio.move_on_after(config.restore_timeout) as scope:
                    await client.restored(_renewal(plan))
                    if plan.workload:
                        await client.call(wire.workload_start(plan.workload))
                if scope.cancelled_caught:
                    raise RestoreTimeout(
                        config.restore_timeout, console=machine.console.text_tail()
                    )
        yield client, network


def _files(spec: MachineSpec) -> set[str]:
    """Name the files that a machine is made of."""
    files = {spec.kernel, spec.initramfs, *(disk.path for disk in spec.disks)}
    if spec.restore is not None:
        patches = (patch.file for patch in spec.restore.patches)
        files |= {spec.restore.state, spec.restore.memory, *patches}
    return {str(file) for file in files if file is not None}


def _removed(name: str, plan: Plan) -> Exception:
    if plan.source is None:
        return ImageNotFound(plan.image.reference, f"{name} was removed; prepare the image again")
    return SnapshotInvalid(name, "it was removed; bake the image or take the snapshot again")


async def _set_up(client: AgentClient, plan: Plan) -> None:
    image = plan.image.config
    await client.set_up(
        greeting.Setup(
            seed=secrets.token_bytes(_SEED),
            hostname=plan.hostname,
            layers=len(plan.spec.disks),
            environment=image.env,
            workdir=image.workdir,
            user=image.user,
            workload=plan.workload,
            stop_signal=image.stop_signal,
        )
    )


def _renewal(plan: Plan) -> greeting.Restore:
    return greeting.Restore(
        seed=secrets.token_bytes(_SEED),
        hostname=plan.config.hostname or "",
        ends_programs=plan.ends_programs,
        machine_id=secrets.token_hex(16),
        boot_id=str(uuid.uuid4()),
    )


async def _start_timeout(plan: Plan, console: str) -> StartTimeout:
    """Give the error for a guest that did not answer; it explains one that said nothing, too."""
    seconds, spec = plan.config.start_timeout, plan.spec
    if console.strip():
        return StartTimeout(seconds, console=console)
    assert spec.initramfs is not None
    engine = await plan.engine.probe()
    if find_kernel(plan.config.assets) or find_initramfs(plan.config.assets):
        other = "do without the kernel or initramfs that AssetPaths or the environment names"
    else:
        other = "another kernel, by `trio-supermachine kernel build`"
    detail = (
        "its console is empty: the firmware or the first steps of the kernel hang, or the host is"
        f" very slow. It was on {engine.detail}, with {spec.memory_mib} MiB of memory, the kernel"
        f" {spec.kernel} ({plan.kernel.release}) and the initramfs {spec.initramfs}"
        f" ({_size(spec.initramfs)}). To try: `trio-supermachine doctor`; {other};"
        " a longer start_timeout"
    )
    return StartTimeout(seconds, console=console, detail=detail)


def _size(file: Path) -> str:
    try:
        return f"{file.stat().st_size} bytes"
    except OSError:
        return "removed meanwhile"
