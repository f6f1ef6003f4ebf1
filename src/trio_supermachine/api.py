"""The front door: the classes that users hold, and through which they come to all others.

An :class:`Image` starts VMs and pools; a :class:`Vm` captures itself as an image; a builder makes
one. They refer to each other, so they are in one module. They are thin: what they do is below, in
:mod:`.bake`, :mod:`.vm` and :mod:`.pool`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, final

import attrs

from ._public import NoPublicConstructor, public
from ._util import validators as check
from ._util.block import Block
from ._util.progress import ProgressCallback
from ._util.run import require_trio
from ._util.validators import StrPath
from .bake.build import build_image
from .bake.builder import BakeBuilder, BakeSettings, settings_of
from .bake.store import Moment
from .config.defaults import EngineName
from .config.vm import VmConfig
from .errors import ConfigError
from .hv.base import Console
from .images.policy import PullPolicy
from .images.prepare import prepare_image
from .images.spec import ImageSpec, image_of, require_image
from .pool.builder import PoolOptions, check_bounds
from .snapshots import Snapshot, open_snapshot
from .vm.files import GuestFiles
from .vm.life import GuestLife
from .vm.network import GuestNetwork
from .vm.plan import plan_start
from .vm.programs import GuestPrograms
from .vm.running import RunningVm, open_vm

if TYPE_CHECKING:
    from .pool.core import PoolCore, PoolSettings, PoolStats


@public
@final
@attrs.frozen(eq=False, kw_only=True, repr=False)
class Image(ImageSpec):
    """An image that is ready to run.

    :meth:`from_oci`, :meth:`builder` and :meth:`from_snapshot` make one, and so does
    :meth:`Vm.snapshot`.

    :ivar reference: the reference as it was given.
    :ivar config: the image's configuration: environment, command, user and so on.
    :ivar layers: read-only squashfs files, lowest first.
    :ivar digest: the digest of the image's manifest. For a docker archive it is the digest of the
        configuration, and for what is no OCI image a digest of what it was made of.
    :ivar engine: the engine that VMs of it run on unless told otherwise.
    :ivar snapshot: the snapshot that its VMs are restored from; ``None`` for an image that boots.
    :ivar memory_mib: the memory that its VMs have unless told otherwise, in MiB.
    :ivar vcpus: the number of CPUs that its VMs have unless told otherwise.
    :ivar guest_port: the TCP port that its workload serves, if that is known.
    :ivar name: the name it was baked under.
    """

    @staticmethod
    async def from_oci(
        ref: str,
        *,
        pull: PullPolicy = PullPolicy.MISSING,
        platform: str | None = None,
        engine: EngineName = "auto",
        progress: ProgressCallback | None = None,
    ) -> Image:
        """Give the image that ``ref`` names, baked: booted once, and restored from then on.

        From a registry it is pulled into the data directory (:doc:`images`), where a pull that was
        broken off goes on the next time. Its layers become read-only file systems there, once for
        all programs, while they are downloaded; digests are verified. The first call for an image
        boots it with 256 MiB and one CPU, waits until its workload is ready (see
        :meth:`OciImageBuilder.with_snapshot`) and captures it; later calls find that snapshot.
        :meth:`builder` bakes with other settings. Cancelling ends the work and leaves nothing
        half-made.

        :param ref: a name in a registry, as Docker writes them
            (``[docker://][HOST[:PORT]/]NAME[:TAG][@DIGEST]``), ``oci:DIR[:TAG]``,
            ``oci-archive:FILE[:TAG]``, ``docker-archive:FILE[:NAME]``, ``rootfs:DIR`` or
            ``builtin:busybox``.
        :param pull: when to ask a registry.
        :param platform: such as ``"linux/arm64"``; ``None`` is Linux on this machine's
            architecture.
        :param engine: the engine for the bake and the VMs of this image.
        :param progress: an async function that is called with
            :class:`~trio_supermachine.Progress` values, one at a time; for each layer the bytes
            that were downloaded, ten times in a second at most.
        :raises ReferenceInvalid: the reference does not parse.
        :raises ImageNotFound: there is no such image, or not for this platform, or it is not here
            and ``pull`` forbids to ask.
        :raises RegistryError: its registry refused or failed.
        :raises ImageCorrupt: it is damaged, lies about a digest, or tries to leave its root.
        :raises BakeFailed: its guest did not get as far as its capture; its message says how to
            bake it otherwise.
        :raises EngineUnavailable: no engine can run a guest here.
        :raises AssetNotFound: a tool is missing; the message names its package.
        :raises NotSupported: the image is of a kind not known here, or for a platform that no
            guest here can have; said before a layer is downloaded.
        :raises DiskFull: there is no room for it.
        :raises ConfigError: another argument makes no sense.
        """
        settings = BakeSettings(reference=ref, pull=pull, platform=platform, engine=engine)
        return await OciImageBuilder._create(settings).build(progress)

    @staticmethod
    def builder(ref: str) -> OciImageBuilder:
        """Begin to say how the image that ``ref`` names is to be baked.

        :meth:`OciImageBuilder.build` does it.

        :param ref: see :meth:`from_oci`.
        :raises ReferenceInvalid: the reference does not parse.
        """
        return OciImageBuilder._create(BakeSettings(reference=ref))

    @staticmethod
    async def from_snapshot(path: StrPath) -> Image:
        """Give the image whose VMs are restored from a snapshot.

        The snapshot was baked or made by :meth:`Vm.snapshot`. It is verified: its memory in full
        once per host, then by its file's identity. Cancelling ends the work.

        :param path: the snapshot's directory, or the ``restore.snap`` in it.
        :raises SnapshotInvalid: a file is missing, damaged, or not what was captured.
        :raises SnapshotIncompatible: another version or engine made it.
        """
        require_trio()
        return _image(image_of(await open_snapshot(path)))

    def start(self, config: VmConfig | None = None) -> AbstractAsyncContextManager[Vm]:
        """Start a VM of this image; the same as :meth:`Vm.start`.

        :param config: how to start it; ``None`` is ``VmConfig()``.
        """
        return Vm.start(self, config)

    def acquire(self, config: VmConfig | None = None) -> AbstractAsyncContextManager[PooledVm]:
        """Acquire a VM of this image for an ``async with`` block, without a pool.

        The VM is restored on entry and ended on exit. :meth:`pool` keeps VMs warm across calls.

        :param config: how to start it; ``None`` is ``VmConfig()``.
        """
        return Block(_acquire(self, config), "image.acquire() as vm")

    def pool(self) -> PoolBuilder:
        """Begin to describe a pool of VMs of this image."""
        return PoolBuilder._create(self)


async def unbaked_image(
    ref: str,
    *,
    pull: PullPolicy = PullPolicy.MISSING,
    platform: str | None = None,
    engine: EngineName = "auto",
    progress: ProgressCallback | None = None,
) -> Image:
    """Give the image that ``ref`` names without a snapshot: its VMs boot.

    Arguments and errors are those of :meth:`Image.from_oci`.
    """
    return _image(
        await prepare_image(ref, pull=pull, platform=platform, engine=engine, progress=progress)
    )


async def image_for_command(
    builder: OciImageBuilder, progress: ProgressCallback | None = None
) -> Image:
    """Give a baked image whose VMs run a command in the place of its workload.

    The bake is the one that :meth:`OciImageBuilder.build` gives, at the moment before its workload
    starts: nothing of the image has run in it.
    """
    settings = settings_of(builder)
    return _image(await build_image(settings, progress=progress, moment=Moment.BOOTED))


def _image(spec: ImageSpec) -> Image:
    return Image(**{field.name: getattr(spec, field.name) for field in attrs.fields(ImageSpec)})


@public
@final
@attrs.frozen(repr=False)
class OciImageBuilder(BakeBuilder):
    """Says how an image is to be baked; :meth:`Image.builder` makes one.

    It never changes: each ``with_*`` method returns a changed copy. All of them but
    :meth:`with_name`, :meth:`with_pull_policy` and :meth:`with_trigger_timeout` change what the
    bake is: builders that agree in the rest, on the same image, kernel and engine, share one
    snapshot.

    :raises ConfigError: (every method) a value makes no sense.
    """

    def with_warmup(self, warmup: Callable[[Vm], Awaitable[object]] | None) -> OciImageBuilder:
        """Await ``warmup(vm)`` on the live guest before it is captured.

        It is told from others by its qualified name and its code, as
        :meth:`with_warmup_tag` says; what it raises comes out of :meth:`build`.

        :param warmup: an async function that is called with a :class:`Vm`.
        """
        if warmup is not None and not callable(warmup):
            raise ConfigError(f"a warm-up is an async function, not {warmup!r}")
        return self._with(warmup=warmup)

    async def build(self, progress: ProgressCallback | None = None) -> Image:
        """Give the image with its snapshot, baked unless that was done before.

        Programs that want the same bake do it once. Cancelling ends the work and leaves nothing
        half-made, and so does a kill.

        :param progress: an async function that is called with
            :class:`~trio_supermachine.Progress` values; its phases are ``"convert"`` and
            ``"verify"``, and for a bake ``"boot"``, ``"wait"``, ``"warmup"``, ``"capture"`` and
            ``"publish"``.
        :raises BakeFailed: the guest did not get as far as its capture.
        :raises EngineUnavailable: no engine can run a guest here.
        :raises NotSupported: also for a platform that no guest here can have.

        Other errors are those of :meth:`Image.from_oci`, and what the warm-up raises.
        """
        require_trio()
        warmup = self._settings.warmup
        warm_up = None if warmup is None else partial(_warm_up, warmup)
        return _image(await build_image(self._settings, warm_up, progress))


async def _warm_up(warmup: Callable[[Vm], Awaitable[object]], running: RunningVm) -> None:
    await warmup(Vm._create(running, _image(running.plan.image)))


@public
class Vm(GuestPrograms, GuestFiles, GuestNetwork, GuestLife, metaclass=NoPublicConstructor):
    """A running virtual machine. :meth:`Vm.start` makes it.

    Every call that needs the guest waits while the VM is paused, raises :exc:`VmExited` once it
    has ended, and is cancellable.

    :ivar image: the :class:`Image` it runs.
    :ivar config: the :class:`VmConfig` it was started with.
    :ivar engine: the name of the engine that runs it.
    :ivar started_by: ``"boot"`` or ``"restore"``.
    :ivar console: the guest's console, kernel and workload alike: ``async for chunk in
        vm.console`` gives bytes from the boot on, to any number of readers, out of a bounded ring.
    """

    _made_by = "Vm.start"

    def __init__(self, running: RunningVm, image: Image) -> None:
        self._running = running
        self.image = image
        self.config: VmConfig = running.plan.config
        self.engine: str = running.engine
        self.started_by: Literal["boot", "restore"] = running.plan.started_by
        self.console: Console = running.console

    def __repr__(self) -> str:
        exited = self._running.exited
        state = "running" if exited is None else f"exited ({exited.reason})"
        return f"<{type(self).__name__} {self.image.reference!r} on {self.engine}: {state}>"

    @staticmethod
    def start(
        image: Image, config: VmConfig | None = None, *, workload: bool = True
    ) -> AbstractAsyncContextManager[Vm]:
        """Start a VM: an async context manager, entered when the guest's agent has answered.

        A VM of an image with a snapshot is restored from it, unless ``config`` needs other
        hardware than the snapshot has: then the image boots. The image's own entrypoint and
        command run as the workload. Leaving the block, by any path, ends the VM at once and waits
        until nothing of it is left on the host. A VM that ends by itself cancels the body, and
        the block raises :exc:`VmExited`.

        :param image: what to start.
        :param config: how to start it; ``None`` is ``VmConfig()``.
        :param workload: run the workload. If false, a boot leaves it out, and in a restored VM all
            programs that ran at the capture are killed before they run again.
        :raises TypeError: ``image`` is no :class:`Image`.
        :raises NotSupported: the configuration asks for what this version does not have.
        :raises EngineUnavailable: no engine can run a guest here.
        :raises AssetNotFound: a kernel or a tool is missing; the message says how to get it.
        :raises StartTimeout: the guest did not answer within ``config.start_timeout`` seconds.
        :raises RestoreTimeout: a restored one did not within ``config.restore_timeout`` seconds.
        :raises SnapshotInvalid: the snapshot is damaged, or of another engine or host.
        :raises AdmissionRefused: its memory can never be admitted (``memory_admission``).
        :raises VmExited: the guest ended before it answered.
        """
        require_image(image)
        starting = _start(image, config or VmConfig(), workload)
        return Block(starting, "Vm.start(image) as vm")

    async def snapshot(self, dest: StrPath) -> Image:
        """Write the VM as it is at this moment to the directory ``dest``; it goes on running.

        Captured are memory, devices, processes and what was written to the root file system. An
        exec that is open now goes on here, and is ended in the restored copies. The guest
        stands still while its memory is copied. Captures of one VM wait for each other.

        Cancelled or failed, it leaves nothing, and the VM runs on.

        :param dest: must not exist, or be an empty directory.
        :returns: an image that restores.
        :raises FileExistsError: there is something at ``dest``.
        :raises OSError: it cannot be written, as on a full disk.
        :raises CaptureFailed: the guest did not come to rest, or the engine refused.
        :raises NotSupported: the VM has devices of the program's own, or its kernel no cgroups.
        :raises VmExited: the VM has ended.

        Example::

            image = await vm.snapshot("checkpoint")
            async with image.start() as copy:
                await copy.ping()
        """
        return self._restoring(await self._running.capture(dest))

    async def snapshot_diff(self, dest: StrPath, base: Image | StrPath) -> Image:
        """Write a snapshot with only the memory that differs from ``base``.

        All else is as for :meth:`snapshot`.

        It is fast if this VM was restored from ``base``; with any other snapshot of a guest of
        the same size all memory is compared. Restoring needs the base, byte for byte as it is.

        :param dest: must not exist, or be an empty directory.
        :param base: a snapshot, full or itself a diff, or an image that has one.
        :returns: an image that restores.
        :raises SnapshotInvalid: the base is damaged, or no base for this VM.
        :raises ConfigError: the base is an image without a snapshot.
        :raises CaptureFailed: the guest did not come to rest, or the engine refused.
        """
        place = base if isinstance(base, str | os.PathLike) else base.snapshot
        if place is None:
            raise ConfigError("the base has no snapshot; take it with vm.snapshot, or bake it")
        directory = place.directory if isinstance(place, Snapshot) else place
        opened = await open_snapshot(directory)
        return self._restoring(await self._running.capture(dest, base=opened))

    #: The same calls under the names that users of the Rust library know.
    snapshot_live = snapshot
    snapshot_diff_live = snapshot_diff

    def _restoring(self, snapshot: Snapshot) -> Image:
        return attrs.evolve(
            self.image,
            engine="auto",
            snapshot=snapshot,
            memory_mib=snapshot.metadata.memory_mib,
            vcpus=snapshot.metadata.vcpus,
        )


@asynccontextmanager
async def _start(image: Image, config: VmConfig, workload: bool) -> AsyncIterator[Vm]:
    require_trio()
    plan = await plan_start(image, config, workload=workload)
    async with open_vm(plan) as running:
        yield Vm._create(running, image)


@public
@final
class PooledVm(Vm):
    """A :class:`Vm` that was acquired: all that a VM has, and whether it was used before.

    It ends, or goes back to its pool, when the block that acquired it ends.

    :ivar reused: somebody else has had it, which a pool with ``restore_on_release(False)`` does;
        what they left in it is still there.
    """

    _made_by = "Pool.acquire"

    def __init__(self, running: RunningVm, image: Image, *, reused: bool) -> None:
        super().__init__(running, image)
        self.reused = reused


@asynccontextmanager
async def _acquire(image: Image, config: VmConfig | None) -> AsyncIterator[PooledVm]:
    require_trio()
    plan = await plan_start(image, config or VmConfig())
    async with open_vm(plan) as running:
        yield PooledVm._create(running, image, reused=False)


@public
@final
class Pool(metaclass=NoPublicConstructor):
    """VMs of one image that are kept restored and warm. :meth:`PoolBuilder.build` makes it.

    It belongs to the run that entered it; its methods are for the tasks of that run.
    """

    _made_by = "PoolBuilder.build"

    def __init__(self, core: PoolCore[RunningVm], image: Image, config: VmConfig) -> None:
        self._core = core
        self._image = image
        self._config = config

    def __repr__(self) -> str:
        return f"<Pool of {self._image.reference!r}: {self.stats()}>"

    def acquire(self) -> AbstractAsyncContextManager[PooledVm]:
        """Acquire a VM: an async context manager giving a :class:`PooledVm`.

        An idle VM is handed over at once. Else the acquirer waits, in the order of arrival, for
        the next that gets ready, and one is restored for it as long as there are fewer than
        ``max``. Leaving the block, by any path, is quick: the VM ends in the background, or
        waits for the next acquirer after ``restore_on_release(False)``.

        Cancelled while it waits, it leaves the queue, and a restore that was begun for it ends
        too. A VM that ends by itself cancels the body of this block alone, which then raises
        :exc:`VmExited`.

        :raises AcquireTimeout: no VM was to be had within the pool's ``acquire_timeout``.
        :raises VmExited: the VM ended during the block.
        :raises trio.ClosedResourceError: the pool was closed, before or during the block.
        :raises SupermachineError: a VM was restored for this acquirer, and failed; errors are as
            of :meth:`Vm.start`. Each failed restore is told to one acquirer, the first that
            waits, unless another restore in flight may serve it.
        """
        return Block(self._acquire(), "pool.acquire() as vm")

    @asynccontextmanager
    async def _acquire(self) -> AsyncIterator[PooledVm]:
        async with self._core.acquire() as lease:
            try:
                yield PooledVm._create(lease.item, self._image, reused=lease.uses > 1)
            finally:
                lease.item.network.end_forwards()  # which are this acquirer's

    def stats(self) -> PoolStats:
        """Give the numbers of the pool, now."""
        return self._core.stats()

    def resize(self, *, min: int | None = None, max: int | None = None) -> None:
        """Change how many VMs are kept, from now on; ``None`` leaves a bound as it is.

        Raising ``min`` restores more in the background. Lowering ``max`` ends VMs that are idle
        or being restored; those in use stay with their acquirers, and end when released.

        :param min: see :meth:`PoolBuilder.min`.
        :param max: see :meth:`PoolBuilder.max`.
        :raises ConfigError: ``min`` is above ``max``, or one of them makes no sense.
        :raises AdmissionRefused: the memory of ``min`` VMs can never be admitted.
        """
        now = self._core.settings
        settings = attrs.evolve(
            now,
            min=now.min if min is None else check.integer("min", min, 0),
            max=now.max if max is None else check.integer("max", max, 1),
        )
        check_bounds(settings, self._image, self._config)
        self._core.apply(settings)


@public
@final
@attrs.frozen(repr=False)
class PoolBuilder(PoolOptions[Image]):
    """A pool in the making, from :meth:`Image.pool`. Immutable: every method gives a changed copy.

    :raises ConfigError: a value makes no sense.
    """

    def __repr__(self) -> str:
        return f"<PoolBuilder of {self._image.reference!r}>"

    def build(self) -> AbstractAsyncContextManager[Pool]:
        """Give the pool: an async context manager, entered when ``min`` VMs are idle and warm.

        Leaving the block, by any path, ends all its VMs, those in use too, and waits until
        nothing of them is left. VMs that die while idle are replaced. When restores fail one
        after another, the pool tries again after growing pauses, 30 s at most, unless an
        acquirer waits; :attr:`PoolStats.last_error` is the newest such error.

        :raises ConfigError: ``min`` is above ``max``.
        :raises AdmissionRefused: on entry, before any VM starts: the memory of ``min`` VMs can
            never be admitted.
        :raises SupermachineError: on entry: one of the first VMs could not be started; errors
            are as of :meth:`Vm.start`.
        """
        opening = _open_pool(self._image, self._options.config, self._options.settings())
        return Block(opening, "image.pool().build() as pool")

    if not TYPE_CHECKING:  # type checkers see that a builder is no block

        def __enter__(self):
            raise TypeError("write 'async with image.pool()....build() as pool:'")

        def __exit__(self, *_):
            pass

        __aenter__, __aexit__ = __enter__, __exit__


@asynccontextmanager
async def _open_pool(image: Image, config: VmConfig, settings: PoolSettings) -> AsyncIterator[Pool]:
    from .pool.core import open_pool  # most programs start VMs one by one
    from .vm.warm import open_warm_vm

    require_trio()
    check_bounds(settings, image, config)

    @asynccontextmanager
    async def open_one() -> AsyncIterator[RunningVm]:
        async with open_warm_vm(await plan_start(image, config)) as running:
            yield running

    async with open_pool(open_one, lambda running: running.usable, settings) as core:
        yield Pool._create(core, image, config)
