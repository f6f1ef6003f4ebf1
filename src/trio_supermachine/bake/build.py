"""The build of an image: its layers prepared, its bake found or made.

Everything that a bake depends on is resolved once, into a :class:`~..vm.plan.Plan`. The bake's
fingerprint is that of the plan, and the plan is what is started. Whoever makes a bake holds its
lock; the layers are marked as used meanwhile, so that nobody prunes them.

A bake is captured at two moments of one guest: when it has booted, and when its workload is ready.
The first serves whoever runs a command in the place of the workload, the second all others.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Final

import attrs
import trio

from .._util.progress import ProgressCallback, report
from .._util.trace import trace
from ..config.vm import VmConfig
from ..errors import NotSupported, RestoreTimeout, SnapshotInvalid, SupermachineError
from ..host.locks import in_use
from ..images.layers import ImageStore
from ..images.prepare import prepare_image
from ..images.spec import ImageSpec, engine_name
from ..kernels import ARCH
from ..oci.config import ImageConfig
from ..oci.platform import Platform
from ..snapshots import Snapshot, layer_refs
from ..snapshots.metadata import FORMAT
from ..vm.plan import Plan, plan_boot, plan_going_on
from ..vm.running import RunningVm
from .builder import BakeSettings
from .fingerprint import BakeInputs, warmup_identity
from .store import BakeStore, Moment

#: Awaits the warm-up of the settings with the VM as users hold it.
WarmUp = Callable[[RunningVm], Awaitable[object]]

_RETRY: Final = 0.02  # seconds, while another program makes the bake, or looks at its layers
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


async def build_image(
    settings: BakeSettings,
    warm_up: WarmUp | None = None,
    progress: ProgressCallback | None = None,
    *,
    moment: Moment = Moment.READY,
) -> ImageSpec:
    """Give the image with its snapshot of ``moment``, baked unless that was done before.

    Cancelling ends the work and leaves nothing half-made.
    """
    async with _planned(settings, progress) as (plan, fingerprint):
        bake = _Bake(settings, plan, fingerprint, warm_up, progress)
        while (snapshot := await bake.find(moment)) is None:
            with bake.store.try_making(fingerprint) as alone:
                if alone:
                    snapshot = await bake.find(moment) or await bake.make(moment)
                    break
            # Somebody else makes it, perhaps for a later moment than this one.
            await trio.sleep(_RETRY)
        bake.store.mark_used(fingerprint)
        if settings.name is not None:
            bake.store.set_name(settings.name, fingerprint)
        return attrs.evolve(plan.image, snapshot=snapshot)


@asynccontextmanager
async def _planned(
    settings: BakeSettings, progress: ProgressCallback | None
) -> AsyncIterator[tuple[Plan, str]]:
    """Resolve the settings into a plan and its fingerprint; nobody prunes its layers meanwhile."""
    warmup = warmup_identity(settings.warmup, settings.tag)
    with ExitStack() as held:
        while True:
            image = await _prepare(settings, progress)
            if all(held.enter_context(in_use(layer)) for layer in image.layers):
                break
            held.close()
            await trio.sleep(_RETRY)
        _refuse_foreign(settings)
        config = VmConfig(memory_mib=image.memory_mib, vcpus=image.vcpus, engine=image.engine)
        plan = await plan_boot(image, config, workload=False, for_capture=True, progress=progress)
        engine = engine_name(plan.engine.name)
        plan = attrs.evolve(
            plan,
            image=attrs.evolve(image, engine=engine),
            config=attrs.evolve(config, engine=engine),
        )
        yield plan, _inputs(settings, plan, warmup).fingerprint()


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
        from .extra import extra_layer  # few images have such files

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


@attrs.frozen
class _Bake:
    """One bake: found in the store, or made there."""

    settings: BakeSettings
    plan: Plan
    fingerprint: str
    warm_up: WarmUp | None
    progress: ProgressCallback | None
    store: BakeStore = attrs.field(factory=BakeStore)

    @property
    def _is_idle(self) -> bool:
        """Whether nothing happens between the two moments."""
        settings = self.settings
        return not (self.plan.image.config.argv or self.warm_up or settings.triggers.has_trigger)

    async def find(self, moment: Moment) -> Snapshot | None:
        """Give the snapshot of a moment, if there is one that is sound."""
        if self._is_idle:
            moment = Moment.READY
        return await self.store.find(self.fingerprint, moment)

    async def make(self, moment: Moment) -> Snapshot:
        """Make the snapshots up to a moment. The caller holds the bake's lock.

        The later moment goes on from the snapshot of the earlier one, if there is one that can be
        restored.
        """
        source = None if self._is_idle else await self.find(Moment.BOOTED)
        if source is not None:
            try:
                return await self._make(moment, source)
            except (RestoreTimeout, SnapshotInvalid) as error:
                trace("vm", "the bake begins anew: %s", error)
        return await self._make(moment, None)

    async def _make(self, moment: Moment, source: Snapshot | None) -> Snapshot:
        from .baking import bake  # each image comes here once

        steps = [moment]
        if source is None and moment is Moment.READY and not self._is_idle:
            steps.insert(0, Moment.BOOTED)
        if self._is_idle:
            steps = [Moment.READY]
        for step in steps:
            await self.store.clear(self.fingerprint, step)
        places = {step: self.store.place(self.fingerprint, step) for step in steps}
        plan = self.plan if source is None else await plan_going_on(self.plan, source)
        try:
            await bake(self.settings, plan, self.warm_up, places, self.fingerprint, self.progress)
        except BaseException:
            with trio.CancelScope(shield=True):
                for step in steps:  # the first snapshot goes, too: nobody has asked for it alone
                    await self.store.clear(self.fingerprint, step)
            raise
        await report(self.progress, "publish", plan.image.reference, 0, None)
        snapshot = await self.find(moment)
        if snapshot is None:
            place = self.store.place(self.fingerprint, moment)
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
