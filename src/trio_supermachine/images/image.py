"""Images: what a VM runs."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, final, get_args

import attrs
import trio

from ..config import EngineName
from ..errors import ConfigError, ImageCorrupt, ImageNotFound
from ..oci.blobs import Archive, Directory
from ..oci.config import ImageConfig
from ..oci.malformed import MalformedError
from ..oci.manifest import LocalImage, find_in_docker_archive, find_in_layout
from ..oci.platform import Platform
from ..oci.progress import ProgressCallback
from ..oci.reference import Reference
from ..vm import Vm
from . import busybox
from .rootfs import HostTree
from .store import ImageStore

if TYPE_CHECKING:
    from ..config import VmConfig


class PullPolicy(Enum):
    """When to ask a registry for an image; local sources are always read as they are."""

    ALWAYS = "always"
    MISSING = "missing"
    NEVER = "never"


@final
@attrs.frozen(eq=False, kw_only=True, repr=False)
class Image:
    """An image that is ready to run. :meth:`from_oci` makes it.

    :ivar reference: the reference as it was given.
    :ivar config: what the image says about running it.
    :ivar layers: read-only squashfs files, lowest first.
    :ivar digest: the digest of the image's manifest; for a docker archive that of its
        configuration, and for what is no OCI image a digest of what it was made of.
    :ivar engine: the engine that VMs of it run on unless told otherwise.
    """

    reference: str
    config: ImageConfig
    layers: tuple[Path, ...]
    digest: str
    engine: EngineName = "auto"

    def __repr__(self) -> str:
        return f"<Image {self.reference!r} {self.digest}>"

    @staticmethod
    async def from_oci(
        ref: str,
        *,
        pull: PullPolicy = PullPolicy.MISSING,
        platform: str | None = None,
        engine: EngineName = "auto",
        progress: ProgressCallback | None = None,
    ) -> Image:
        """Prepare the image that ``ref`` names.

        Layers become read-only file systems in the data directory, once for all programs;
        digests are verified. Cancelling ends the work and leaves nothing half-made.

        :param ref: ``oci:DIR[:TAG]``, ``oci-archive:FILE[:TAG]``,
            ``docker-archive:FILE[:NAME]``, ``rootfs:DIR`` or ``builtin:busybox``.
        :param pull: when to ask a registry.
        :param platform: such as ``"linux/arm64"``; ``None`` is Linux on this machine's
            architecture.
        :param engine: the engine for VMs of this image.
        :param progress: an async function that is called with
            :class:`~trio_supermachine.Progress` values.
        :raises ReferenceInvalid: the reference does not parse.
        :raises ImageNotFound: there is no such image, or not for this platform.
        :raises ImageCorrupt: it is damaged, lies about a digest, or tries to leave its root.
        :raises AssetNotFound: a tool is missing; the message names its package.
        :raises NotSupported: the image is in a registry, or of a kind not known here.
        :raises ConfigError: another argument makes no sense.
        """
        parsed = Reference.parse(ref)
        wanted = Platform.parse(platform)
        if not isinstance(pull, PullPolicy):
            raise ConfigError(f"pull is a PullPolicy, not {pull!r}")
        if engine not in get_args(EngineName):
            raise ConfigError(f"engine {engine!r} is not one of {', '.join(get_args(EngineName))}")
        parsed.require_local()
        await trio.lowlevel.checkpoint()
        try:
            found = await _prepare(parsed, wanted, ImageStore(), progress)
        except MalformedError as error:
            raise ImageCorrupt(ref, str(error)) from error
        return Image(
            reference=ref,
            config=found.config,
            layers=found.layers,
            digest=found.digest,
            engine=engine,
        )

    def start(self, config: VmConfig | None = None) -> AbstractAsyncContextManager[Vm]:
        """The same as :meth:`Vm.start` with this image."""
        return Vm.start(self, config)


@attrs.frozen
class _Prepared:
    digest: str
    config: ImageConfig
    layers: tuple[Path, ...]


async def _prepare(
    reference: Reference, platform: Platform, store: ImageStore, progress: ProgressCallback | None
) -> _Prepared:
    if reference.transport == "builtin":
        program = await busybox.find_busybox(store.downloads)
        key = program.fingerprint()
        layer = await store.made("builtin", key, program.write)
        return _Prepared("sha256:" + key, busybox.CONFIG, (layer,))
    if reference.transport == "rootfs":
        tree = HostTree(_existing(reference, directory=True))
        key = await trio.to_thread.run_sync(tree.fingerprint)
        layer = await store.made("rootfs", key, tree.write)
        return _Prepared("sha256:" + key, ImageConfig(), (layer,))
    image = await trio.to_thread.run_sync(_find, reference, platform)
    return _Prepared(image.digest, image.config, await store.layers(image.layers, progress))


def _find(reference: Reference, platform: Platform) -> LocalImage:
    match reference.transport:
        case "oci":
            files = Directory(_existing(reference, directory=True))
            return find_in_layout(files, reference, platform)
        case "oci-archive":
            return find_in_layout(
                Archive(_existing(reference, directory=False)), reference, platform
            )
        case _:
            return find_in_docker_archive(
                Archive(_existing(reference, directory=False)), reference, platform
            )


def _existing(reference: Reference, *, directory: bool) -> Path:
    path = Path(reference.path).absolute()
    if not path.exists():
        raise ImageNotFound(str(reference), f"{path} does not exist")
    if path.is_dir() != directory:
        kind = "a directory" if directory else "a file"
        raise ImageNotFound(str(reference), f"{path} is not {kind}")
    return path
