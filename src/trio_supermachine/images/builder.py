"""Images that are baked: booted once, and from then on restored."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, final

import attrs
import trio

from .. import _validators as check
from ..config import MAX_VCPUS, MIN_MEMORY_MIB, EngineName
from ..errors import ConfigError, NotSupported, SupermachineError
from ..hv.select import choose_engine
from ..kernels import BootAssets, prepare_kernel
from ..oci.config import ImageConfig
from ..oci.platform import Platform
from ..oci.progress import ProgressCallback, report
from ..resources import DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, SnapshotResources
from ..snapshots import Snapshot, layer_refs
from ..snapshots.metadata import FORMAT
from .bakes import BakeStore, check_name
from .baking import BakePlan, Warmup, bake
from .extra import ExtraFile, extra_layer
from .fingerprint import BakeInputs, warmup_identity
from .image import Image, PullPolicy, engine_name
from .locks import in_use
from .prepare import check_request, prepare_image
from .store import ImageStore

_MAX_TEXT: Final = 64 * 1024  # bytes; an argument, or a variable with its name
_RETRY: Final = 0.02  # seconds, while another program looks whether a layer is needed


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ConfigError(f"{name} must be text without NUL, not {value!r}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"{name} must be proper Unicode, not {value!r}") from None
    if size > _MAX_TEXT:
        raise ConfigError(f"{name} is longer than {_MAX_TEXT} bytes")
    return value


def _words(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list of words, not {value!r}")
    return tuple(_text(name, word) for word in value)


@final
@attrs.frozen(kw_only=True, repr=False)
class OciImageBuilder:
    """Says how an image is to be baked; :meth:`Image.builder` makes one.

    It never changes: each ``with_*`` method returns a changed copy. All of them but
    :meth:`with_name`, :meth:`with_pull_policy` and :meth:`with_trigger_timeout` change what the
    bake is: builders that agree in the rest, on the same image, kernel and engine, share one
    snapshot.

    :raises ConfigError: (every method) a value makes no sense.
    """

    _reference: str
    _name: str | None = None
    _platform: str | None = None
    _memory_mib: int = DEFAULT_MEMORY_MIB
    _vcpus: int = DEFAULT_VCPUS
    _env: tuple[tuple[str, str], ...] = ()
    _cmd: tuple[str, ...] | None = None
    _entrypoint: tuple[str, ...] | None = None
    _user: str | None = None
    _workdir: str | None = None
    _guest_port: int | None = None
    _files: tuple[ExtraFile, ...] = ()
    _pull: PullPolicy = PullPolicy.MISSING
    _engine: EngineName = "auto"
    _plan: BakePlan = attrs.field(factory=BakePlan)
    _tag: str | None = None

    def __attrs_post_init__(self) -> None:
        check_request(self._reference, self._pull, self._platform, self._engine)

    def __repr__(self) -> str:
        return f"<OciImageBuilder {self._reference!r}>"

    def with_name(self, name: str) -> OciImageBuilder:
        """Give the bake a name, which moves to the newest bake that has it."""
        return self._with(name=check_name(name))

    def with_platform(self, platform: str | None) -> OciImageBuilder:
        """Take this variant of the image, such as ``"linux/arm64"``."""
        return self._with(platform=platform)

    def with_memory_mib(self, memory_mib: int) -> OciImageBuilder:
        """Give the guest this much memory, in MiB, instead of 256."""
        return self._with(memory_mib=check.integer("memory_mib", memory_mib, MIN_MEMORY_MIB))

    def with_vcpus(self, vcpus: int) -> OciImageBuilder:
        """Give the guest this many CPUs, instead of 1."""
        return self._with(vcpus=check.integer("vcpus", vcpus, 1, MAX_VCPUS))

    def with_env(self, key: str, value: str) -> OciImageBuilder:
        """Set a variable in the environment of the workload and of all execs."""
        if not _text("the name of a variable", key) or "=" in key:
            raise ConfigError(f"{key!r} is not the name of a variable")
        return self._with(env=(*self._env, (key, _text(key, value))))

    def with_cmd(self, cmd: list[str]) -> OciImageBuilder:
        """Run this command in place of the image's own, after its entrypoint."""
        return self._with(cmd=_words("cmd", cmd))

    def with_entrypoint(self, entrypoint: list[str]) -> OciImageBuilder:
        """Run this entrypoint in place of the image's own; the image's command goes with that."""
        return self._with(entrypoint=_words("entrypoint", entrypoint))

    def with_user(self, user: str) -> OciImageBuilder:
        """Run workload and execs as this user: a name or id, with an optional ``:GROUP``."""
        return self._with(user=_text("user", user))

    def with_workdir(self, workdir: str) -> OciImageBuilder:
        """Run workload and execs in this directory."""
        return self._with(workdir=check.guest_path(workdir))

    def with_guest_port(self, port: int) -> OciImageBuilder:
        """Say that the workload serves a TCP port; the capture waits until it listens."""
        return self._with(guest_port=check.integer("guest_port", port, 1, 65535))

    def with_extra_file(
        self, path: check.StrPath, data: bytes, mode: int = 0o644
    ) -> OciImageBuilder:
        """Add a file of root's to the image, before anything runs; a later one of the same path
        replaces it, as it replaces the image's own.

        Directories that the image lacks are made; links on the way are followed.
        """
        file = ExtraFile(path, data, mode)
        others = tuple(other for other in self._files if other.path != file.path)
        return self._with(files=(*others, file))

    def with_pull_policy(self, policy: PullPolicy) -> OciImageBuilder:
        """Say when to ask a registry for the image."""
        return self._with(pull=policy)

    def with_engine(self, engine: EngineName) -> OciImageBuilder:
        """Bake on this engine. Only it can restore the snapshot."""
        return self._with(engine=engine)

    def with_warmup(self, warmup: Warmup | None) -> OciImageBuilder:
        """Await ``warmup(vm)`` on the live guest before it is captured.

        It is told from others by its qualified name and its code, as
        :meth:`with_warmup_tag` says; what it raises comes out of :meth:`build`.
        """
        if warmup is not None and not callable(warmup):
            raise ConfigError(f"a warm-up is an async function, not {warmup!r}")
        return self._with_plan(warmup=warmup)

    def with_warmup_tag(self, tag: str | None) -> OciImageBuilder:
        """Tell warm-ups apart by this tag alone.

        Without one it is the qualified name and the code of the warm-up that count, with
        constants and defaults and what it closes over so far as that is constant; not the code
        of functions that it calls, nor files that it reads.
        """
        return self._with(tag=None if tag is None else _text("a tag", tag))

    def with_snapshot(self, resources: SnapshotResources) -> OciImageBuilder:
        """Say when to capture: at the first of these triggers, and after ``quiesce_ms``.

        Without a trigger an image with a TCP port (exposed, or :meth:`with_guest_port`) is
        captured when something in its guest listens; one with another workload when that
        listens or has ended, or a second after the boot, whichever is first; and one without a
        workload at once. ``after_ms`` counts from the moment when the guest's agent has
        answered, ``at_heartbeat`` counts answers of the agent, ten in a second. The warm-up
        follows the trigger.
        """
        if not isinstance(resources, SnapshotResources):
            raise ConfigError(f"this must be a SnapshotResources, not {resources!r}")
        if resources.out_path is not None:
            raise ConfigError("a bake has its place in the data directory; leave out_path out")
        return self._with_plan(triggers=resources)

    def with_trigger_timeout(self, seconds: float) -> OciImageBuilder:
        """Wait this long for a trigger before :meth:`build` gives up, instead of 60 seconds."""
        return self._with_plan(timeout=check.seconds("the timeout", seconds))

    async def build(self, progress: ProgressCallback | None = None) -> Image:
        """The image with its snapshot, baked unless that was done before.

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
        warmup = warmup_identity(self._plan.warmup, self._tag)
        while True:
            image = await self._prepare(progress)
            with ExitStack() as held:
                # As long as they are held nobody prunes them.
                if all(held.enter_context(in_use(layer)) for layer in image.layers):
                    return await self._build(image, warmup, progress)
            await trio.sleep(_RETRY)

    async def _prepare(self, progress: ProgressCallback | None) -> Image:
        """The image as it is to run, without a snapshot."""
        store = ImageStore()
        image = await prepare_image(
            self._reference,
            pull=self._pull,
            platform=self._platform,
            engine=self._engine,
            progress=progress,
            store=store,
        )
        layers = image.layers
        if self._files:
            digests = [ref.sha256 for ref in await layer_refs(layers)]
            layers = (*layers, await extra_layer(store, layers, digests, self._files))
        return attrs.evolve(
            image,
            config=self._configure(image.config),
            layers=layers,
            memory_mib=self._memory_mib,
            vcpus=self._vcpus,
            guest_port=self._guest_port,
            name=self._name,
        )

    async def _build(
        self, image: Image, warmup: str | None, progress: ProgressCallback | None
    ) -> Image:
        engine = await choose_engine(image.engine)
        boot = await prepare_kernel(progress=progress)
        self._refuse_foreign(boot)
        layers = await layer_refs(image.layers)
        inputs = BakeInputs(
            digest=image.digest,
            layers=tuple(ref.sha256 for ref in layers),
            config=image.config,
            memory_mib=self._memory_mib,
            vcpus=self._vcpus,
            guest_port=self._guest_port,
            kernel=boot.kernel_digest,
            initramfs=boot.initramfs_digest,
            engine=engine.name,
            host=await engine.host_facts(),
            triggers=self._plan.triggers,
            warmup=warmup,
            format=FORMAT,
        )
        fingerprint = inputs.fingerprint()
        bakes = BakeStore()
        image = attrs.evolve(image, engine=engine_name(engine.name))
        snapshot = await bakes.find(fingerprint)
        if snapshot is None:
            async with bakes.making(fingerprint):
                snapshot = await bakes.find(fingerprint)
                if snapshot is None:
                    snapshot = await self._bake(image, fingerprint, bakes, progress)
        bakes.mark_used(fingerprint)
        if self._name is not None:
            bakes.set_name(self._name, fingerprint)
        return attrs.evolve(image, snapshot=snapshot)

    async def _bake(
        self,
        image: Image,
        fingerprint: str,
        bakes: BakeStore,
        progress: ProgressCallback | None,
    ) -> Snapshot:
        await bakes.clear(fingerprint)
        place: Path = bakes.place(fingerprint)
        await bake(image, self._plan, place, fingerprint, progress)
        await report(progress, "publish", image.reference, 0, None)
        snapshot = await bakes.find(fingerprint)
        if snapshot is None:
            raise SupermachineError(f"{place} was removed or damaged as soon as it was there")
        return snapshot

    def _configure(self, config: ImageConfig) -> ImageConfig:
        changed = {key for key, _ in self._env}
        env = dict(self._env)  # the last value of each counts
        kept = tuple(entry for entry in config.env if entry.partition("=")[0] not in changed)
        cmd = config.cmd if self._entrypoint is None else ()
        return attrs.evolve(
            config,
            env=(*kept, *(f"{key}={value}" for key, value in env.items())),
            entrypoint=config.entrypoint if self._entrypoint is None else self._entrypoint,
            cmd=cmd if self._cmd is None else self._cmd,
            user=config.user if self._user is None else self._user,
            workdir=config.workdir if self._workdir is None else self._workdir,
        )

    def _refuse_foreign(self, boot: BootAssets) -> None:
        wanted = Platform.parse(self._platform)
        if (wanted.os, wanted.architecture) != ("linux", _architecture(boot)):
            raise NotSupported(
                f"platform {wanted}", f"guests here are linux/{_architecture(boot)}, not {wanted}"
            )

    def _with(self, **changes: Any) -> OciImageBuilder:
        return attrs.evolve(self, **changes)

    def _with_plan(self, **changes: Any) -> OciImageBuilder:
        return attrs.evolve(self, plan=attrs.evolve(self._plan, **changes))


def _architecture(boot: BootAssets) -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(boot.arch, boot.arch)
