"""The capture: how a running VM becomes a snapshot on the disk.

The order matters. The agent freezes all guest programs; then the engine stops the vCPUs and saves
the device state and the memory that changed; then the vCPUs run again, the clock is set, and the
programs thaw. So a restored copy has its own random numbers before any of its programs runs. What
remains, checksums and metadata, is done while the guest runs.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from .._util.trace import trace
from ..agent import wire
from ..agent.client import AgentClient
from ..errors import CaptureFailed, ExecEof, NotSupported, VmExited
from ..snapshots import (
    Draft,
    Snapshot,
    finish_diff,
    finish_full,
    layer_refs,
    new_snapshot,
    open_snapshot,
)
from ..snapshots.files import FULL_MEMORY, STATE
from ..snapshots.metadata import LayerRef
from .plan import Plan

_THAW: Final = 5.0  # seconds for the guest to go on, also when the capture is being cancelled


async def capture(
    client: AgentClient,
    plan: Plan,
    dest: str | os.PathLike[str],
    *,
    base: Snapshot | None = None,
    fingerprint: str | None = None,
    workload_started: bool = True,
) -> Snapshot:
    """Write a snapshot of the machine to ``dest``; with ``base`` only what differs from that.

    The guest goes on as soon as its memory is copied. Cancelled or failed, nothing is at ``dest``.
    """
    image = plan.image
    async with new_snapshot(dest) as directory:
        layers = await layer_refs(image.layers)  # remembered, if they are as they were
        if plan.layers is not None and _digests(layers) != _digests(plan.layers):
            raise CaptureFailed(f"the layers of {image.reference} have changed since the start")
        draft = Draft(
            engine=plan.engine.name,
            host=plan.host,
            kernel=plan.kernel.kernel,
            initramfs=plan.kernel.initramfs,
            kernel_release=plan.kernel.release,
            memory_mib=plan.spec.memory_mib,
            vcpus=plan.spec.vcpus,
            hostname=plan.hostname,
            image_reference=image.reference,
            image_digest=image.digest,
            image_config=image.config,
            layers=layers,
            guest_port=image.guest_port,
            fingerprint=fingerprint,
            workload_started=workload_started,
        )
        captured = await client.machine.capture(
            directory / STATE,
            directory / FULL_MEMORY,
            at_rest=_frozen(client),
            since=None if base is None else base.identity,
        )
        trace("vm", "%r stood still for %.1f ms", image.reference, captured.standstill * 1e3)
        if base is None:
            await finish_full(directory, draft)
        else:
            await finish_diff(directory, draft, captured.runs, base, complete=captured.complete)
    with trio.CancelScope(shield=True):  # what is published is not taken back
        snapshot = await open_snapshot(dest)
    trace("vm", "snapshot %s of %r", snapshot.identity, image.reference)
    return snapshot


def _digests(layers: Iterable[LayerRef]) -> list[str]:
    return [layer.sha256 for layer in layers]


@asynccontextmanager
async def _frozen(client: AgentClient) -> AsyncIterator[None]:
    """Freeze all guest programs for a block; set the clock and thaw them behind it."""
    try:
        try:
            await client.call(wire.freeze())
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                message = "a snapshot needs a guest kernel with cgroups (CONFIG_CGROUPS)"
                raise NotSupported("snapshot", message) from exc
            message = f"the guest's programs could not be frozen: {exc.strerror}"
            raise CaptureFailed(message) from exc
        yield
    finally:
        with trio.move_on_after(_THAW, shield=True), suppress(OSError, VmExited, ExecEof):
            await client.call(wire.set_clock(time.time_ns()))
            await client.call(wire.thaw())
