"""The build of an image: its layers prepared, its bake found or made.

Everything that a bake depends on is resolved once, into a :class:`~..vm.plan.Plan`. The bake's
fingerprint is that of the plan, and the plan is what is started. Whoever makes a bake holds its
lock; the layers are marked as used meanwhile, so that nobody prunes them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Final

import attrs
import trio

from .._util.progress import ProgressCallback, report
from ..config.vm import VmConfig
from ..errors import NotSupported, SupermachineError
from ..host.locks import in_use
from ..images.layers import ImageStore
from ..images.prepare import prepare_image
from ..images.spec import ImageSpec, engine_name
from ..kernels import ARCH
from ..oci.config import ImageConfig
from ..oci.platform import Platform
from ..snapshots import Snapshot, layer_refs
from ..snapshots.metadata import FORMAT
from ..vm.plan import Plan, plan_boot
from ..vm.running import RunningVm
from .baking import bake
from .builder import BakeSettings
from .extra import extra_layer
from .fingerprint import BakeInputs, warmup_identity
from .store import BakeStore

#: Awaits the warm-up of the settings with the VM as users hold it.
WarmUp = Callable[[RunningVm], Awaitable[object]]

_RETRY: Final = 0.02  # seconds, while another program looks whether a layer is needed
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


async def build_image(
    settings: BakeSettings, warm_up: WarmUp | None, progress: ProgressCallback | None
) -> ImageSpec:
    """Give the image with its snapshot, baked unless that was done before.

    Cancelling ends the work and leaves nothing half-made.
    """
    warmup = warmup_identity(settings.warmup, settings.tag)
    while True:
        image = await _prepare(settings, progress)
        with ExitStack() as held:
            # As long as they are held nobody prunes them.
            if all(held.enter_context(in_use(layer)) for layer in image.layers):
                return await _find_or_bake(settings, image, warmup, warm_up, progress)
        await trio.sleep(_RETRY)


async def _prepare(settings: BakeSettings, progress: ProgressCallback | None) -> ImageSpec:
    """Give the image as it is to run, without a snapshot."""
    store = ImageStore()
    image = await prepare_image(
        settings.reference,
        pull=settings.pull,
        platform=settings.platform,
        engine=settings.engine,
        progress=progress,
        store=store,
    )
    layers = image.layers
    if settings.files:
        digests = [ref.sha256 for ref in await layer_refs(layers)]
        layers = (*layers, await extra_layer(store, layers, digests, settings.files))
    return attrs.evolve(
        image,
        config=_configure(settings, image.config),
        layers=layers,
        memory_mib=settings.memory_mib,
        vcpus=settings.vcpus,
        guest_port=settings.guest_port,
        name=settings.name,
    )


async def _find_or_bake(
    settings: BakeSettings,
    image: ImageSpec,
    warmup: str | None,
    warm_up: WarmUp | None,
    progress: ProgressCallback | None,
) -> ImageSpec:
    _refuse_foreign(settings)
    config = VmConfig(memory_mib=image.memory_mib, vcpus=image.vcpus, engine=image.engine)
    plan = await plan_boot(image, config, for_capture=True, progress=progress)
    fingerprint = _inputs(settings, plan, warmup).fingerprint()
    bakes = BakeStore()
    snapshot = await bakes.find(fingerprint)
    if snapshot is None:
        async with bakes.making(fingerprint):
            snapshot = await bakes.find(fingerprint)
            if snapshot is None:
                snapshot = await _bake(settings, plan, fingerprint, bakes, warm_up, progress)
    bakes.mark_used(fingerprint)
    if settings.name is not None:
        bakes.set_name(settings.name, fingerprint)
    return attrs.evolve(image, engine=engine_name(plan.engine.name), snapshot=snapshot)


async def _bake(
    settings: BakeSettings,
    plan: Plan,
    fingerprint: str,
    bakes: BakeStore,
    warm_up: WarmUp | None,
    progress: ProgressCallback | None,
) -> Snapshot:
    await bakes.clear(fingerprint)
    place = bakes.place(fingerprint)
    await bake(settings, plan, warm_up, place, fingerprint, progress)
    await report(progress, "publish", plan.image.reference, 0, None)
    snapshot = await bakes.find(fingerprint)
    if snapshot is None:
        raise SupermachineError(f"{place} was removed or damaged as soon as it was there")
    return snapshot


def _inputs(settings: BakeSettings, plan: Plan, warmup: str | None) -> BakeInputs:
    assert plan.layers is not None
    return BakeInputs(
        digest=plan.image.digest,
        layers=tuple(ref.sha256 for ref in plan.layers),
        config=plan.image.config,
        memory_mib=plan.spec.memory_mib,
        vcpus=plan.spec.vcpus,
        guest_port=plan.image.guest_port,
        kernel=f"sha256:{plan.kernel.kernel}",
        initramfs=f"sha256:{plan.kernel.initramfs}",
        engine=plan.engine.name,
        host=plan.host,
        triggers=settings.triggers,
        warmup=warmup,
        format=FORMAT,
    )


def _configure(settings: BakeSettings, config: ImageConfig) -> ImageConfig:
    """Give the image's configuration with what the settings change of it."""
    env = dict(settings.env)  # the last value of each counts
    kept = tuple(entry for entry in config.env if entry.partition("=")[0] not in env)
    cmd = config.cmd if settings.entrypoint is None else ()
    return attrs.evolve(
        config,
        env=(*kept, *(f"{key}={value}" for key, value in env.items())),
        entrypoint=config.entrypoint if settings.entrypoint is None else settings.entrypoint,
        cmd=cmd if settings.cmd is None else settings.cmd,
        user=config.user if settings.user is None else settings.user,
        workdir=config.workdir if settings.workdir is None else settings.workdir,
    )


def _refuse_foreign(settings: BakeSettings) -> None:
    wanted = Platform.parse(settings.platform)
    here = _ARCHITECTURES.get(ARCH, ARCH)
    if (wanted.os, wanted.architecture) != ("linux", here):
        raise NotSupported(f"platform {wanted}", f"guests here are linux/{here}, not {wanted}")
