"""Preparation of images: a reference becomes layers on the disk, and a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import attrs
import trio

from .._util.progress import Progress, ProgressCallback
from ..config.defaults import EngineName
from ..errors import ConfigError, ImageCorrupt, ImageNotFound
from ..oci import MalformedError
from ..oci.blobs import Archive, Directory
from ..oci.config import ImageConfig
from ..oci.manifest import LocalImage, find_in_docker_archive, find_in_layout
from ..oci.platform import Platform
from ..oci.reference import Reference, Transport
from .arrival import full_disk
from .layers import ImageStore
from .policy import PullPolicy
from .spec import ImageSpec


async def prepare_image(
    ref: str,
    *,
    pull: PullPolicy = PullPolicy.MISSING,
    platform: str | None = None,
    engine: EngineName = "auto",
    progress: ProgressCallback | None = None,
    store: ImageStore | None = None,
) -> ImageSpec:
    """Give the image that ``ref`` names, without a snapshot.

    The other arguments and the errors are those of :meth:`Image.from_oci`.

    :param store: the store for its layers; ``None`` is the library's own.
    """
    parsed, wanted = check_request(ref, pull, platform, engine)
    await trio.lowlevel.checkpoint()
    store = store or ImageStore()
    telling = None if progress is None else _one_at_a_time(progress)
    try:
        with full_disk(store.root):
            if parsed.transport is Transport.DOCKER:
                found = await _pull(parsed, wanted, pull, store, telling)
            else:
                found = await _prepare(parsed, wanted, store, telling)
    except MalformedError as error:
        raise ImageCorrupt(ref, str(error)) from error
    return ImageSpec(
        reference=ref,
        config=found.config,
        layers=found.layers,
        digest=found.digest,
        engine=engine,
    )


def check_request(
    ref: str, pull: PullPolicy, platform: str | None, engine: str
) -> tuple[Reference, Platform]:
    """Parse and check the arguments of a request, before any work."""
    parsed = Reference.parse(ref)
    wanted = Platform.parse(platform)
    if not isinstance(pull, PullPolicy):
        raise ConfigError(f"pull is a PullPolicy, not {pull!r}")
    if engine not in get_args(EngineName):
        raise ConfigError(f"engine {engine!r} is not one of {', '.join(get_args(EngineName))}")
    return parsed, wanted


@attrs.frozen
class _Prepared:
    digest: str
    config: ImageConfig
    layers: tuple[Path, ...]


async def _pull(
    reference: Reference,
    platform: Platform,
    policy: PullPolicy,
    store: ImageStore,
    progress: ProgressCallback | None,
) -> _Prepared:
    # Each transport brings its own: these are for registries alone.
    from .content import ContentStore
    from .pull import pulled

    content = ContentStore(store.root)
    pulling = pulled(reference, platform, policy, store=content, progress=progress)
    async with pulling as image:
        try:
            layers = await store.layers(image.layers, progress)
        except MalformedError:
            # The registry has lied, or the disk has lost something. Blobs that are wrong are
            # removed, so that the next pull brings them again.
            for layer in image.layers:
                if layer.digest is not None:
                    await content.verify(layer.digest)
            raise
    return _Prepared(image.digest, image.config, layers)


def _one_at_a_time(progress: ProgressCallback) -> ProgressCallback:
    """Wrap a callback so that it is called by one task at a time, and not after it has failed.

    Downloads and conversions go on side by side. No caller expects its callback to run twice at
    once, nor to be called again after an error of its own, which ends both.
    """
    lock = trio.Lock()
    failed = False

    async def tell(step: Progress) -> None:
        nonlocal failed
        async with lock:
            if failed:
                return
            try:
                await progress(step)
            except Exception:
                failed = True
                raise

    return tell


async def _prepare(
    reference: Reference, platform: Platform, store: ImageStore, progress: ProgressCallback | None
) -> _Prepared:
    if reference.transport == "builtin":
        from . import busybox

        program = await busybox.find_busybox(store.downloads)
        key = program.fingerprint()
        layer = await store.made("builtin", key, program.write)
        return _Prepared("sha256:" + key, busybox.CONFIG, (layer,))
    if reference.transport == "rootfs":
        from .rootfs import HostTree

        tree = HostTree(_existing(reference, directory=True))
        key = await trio.to_thread.run_sync(tree.fingerprint)
        layer = await store.made("rootfs", key, tree.write)
        return _Prepared("sha256:" + key, ImageConfig(), (layer,))
    image = await trio.to_thread.run_sync(find_local, reference, platform)
    return _Prepared(image.digest, image.config, await store.layers(image.layers, progress))


def find_local(reference: Reference, platform: Platform) -> LocalImage:
    """Find the image in a layout or archive.

    :raises ImageNotFound: it is not there.
    :raises MalformedError: a document is damaged.
    """
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
