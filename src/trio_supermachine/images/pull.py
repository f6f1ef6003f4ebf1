"""Pulls: a name in a registry becomes an image in the content store, as a policy says.

A pull goes through these steps. Each keeps its blobs by the pull's lease *before* it looks for
them in the store, so that no other program removes them in between (see :mod:`.content`).

#. Unless the policy is ``ALWAYS``, look the image up in the store. An image that is here in full
   ends the pull; for ``NEVER`` anything else is an error.
#. Ask the registry for the digest that the tag stands for.
#. Fetch the documents that are not here, and choose the image for the platform. An image that is
   not for this platform, too large, or of a kind that is not known is refused now, before any
   layer is downloaded.
#. Download the layers that are missing, while the body of the block reads them from their
   beginnings and makes squashfs files of them.
#. When the body is done and all layers are here, let the name stand for the image.

The registry is not trusted: documents and layers are checked against their digests, and bounded in
number and size. A body that finds a layer damaged discards what has come of all of them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

from .._util.nursery import open_flat_nursery
from .._util.progress import ProgressCallback
from ..errors import ImageCorrupt, ImageNotFound, NotSupported
from ..oci import MalformedError
from ..oci.blobs import MAX_DOCUMENT, sha256
from ..oci.documents import INDEXES, MANIFESTS, Descriptor
from ..oci.manifest import Choice, LayerSource, LocalImage, Search, choose, on_disk, read_document
from ..oci.platform import Platform
from ..oci.reference import Reference
from .content import ContentStore, Lease
from .download import Download
from .limits import VARIABLE, max_image, max_layer
from .policy import PullPolicy

if TYPE_CHECKING:
    from ..oci.registry import Registry

_Get = Callable[[Descriptor], Awaitable[bytes]]


class _Absent(Exception):
    """The store does not have a document."""


@asynccontextmanager
async def pulled(
    reference: Reference,
    platform: Platform,
    policy: PullPolicy,
    *,
    store: ContentStore | None = None,
    progress: ProgressCallback | None = None,
    to_run: bool = True,
) -> AsyncIterator[LocalImage]:
    """Give the image that a ``docker`` reference names, while its layers may be on their way.

    The layers' blobs can be read in the block. The block ends when all of them are in the store,
    which then records what the name stands for. If the body fails, or is cancelled, the downloads
    end, and what has come stays for the next pull. No other program prunes the image during the
    block.

    :param policy: as for :class:`~trio_supermachine.PullPolicy`.
    :param progress: is awaited with the phase ``"download"``, a layer's digest and its bytes, at
        most ten times in a second for each layer.
    :param to_run: refuse a platform that no guest here can have.
    :raises ImageNotFound: the registry does not have the image, or not for this platform; or the
        store does not have it, and the policy forbids to ask.
    :raises ImageCorrupt: the registry sent other bytes than its documents say.
    :raises MalformedError: a document does not follow its format.
    :raises NotSupported: the image is for another platform, or of a kind that is not known.
    :raises RegistryError: the registry refused or failed.
    :raises DiskFull: there is no room for the image.
    """
    store = store or ContentStore()
    async with store.lease() as lease:
        if policy is not PullPolicy.ALWAYS or reference.digest is not None:
            choice = await _in_store(store, lease, reference, platform, policy)
            if choice is not None:
                if to_run:
                    refuse_foreign(reference, platform)
                yield on_disk(store, choice, checked=True)
                await _note_digest(store, reference)
                return
        # The network's modules take longer to load than all of the above.
        from ..oci.registry import open_registry

        async with open_registry(reference) as registry:
            digest = reference.digest
            if digest is None:
                assert reference.tag is not None
                digest = await registry.resolve(reference.tag)
            top = await _top(store, lease, registry, digest)
            get = _Documents(store, lease, registry).get
            choice = await _drive(choose([top], reference, platform), get)
            if to_run:
                refuse_foreign(reference, platform)
            _refuse_large(reference, choice)
            layers = [layer for layer, _ in choice.layers]
            await lease.keep(*(layer.digest for layer in layers))
            missing = [layer for layer in layers if not store.has(layer)]
            with closing(Download(store, registry, missing, progress)) as download:
                try:
                    async with open_flat_nursery() as nursery:
                        nursery.start_soon(download.run)
                        try:
                            yield _arriving(choice, download)
                        except MalformedError:
                            download.discard()
                            raise
                except ExceptionGroup:
                    if download.failure is not None:
                        raise download.failure from None  # why the body failed, too
                    raise
            await store.set_record(name_of(reference), top)


def name_of(reference: Reference) -> str:
    """Give the name by which the store records a ``docker`` reference."""
    return str(reference).removeprefix("docker://")


def refuse_foreign(reference: Reference, platform: Platform) -> None:
    """Refuse a platform that no guest here can have.

    :raises NotSupported: the platform is another one.
    """
    here = Platform.parse(None)
    if (platform.os, platform.architecture) != (here.os, here.architecture):
        raise NotSupported(
            f"platform {platform}",
            f"{reference}: guests here are {here}, not {platform}; trio-supermachine pull"
            f" --platform {platform} fetches an image without running it",
        )


def find_pulled(store: ContentStore, reference: Reference, platform: Platform) -> Choice | None:
    """Find the image that the store has for a reference, by its documents alone.

    Its layers may be missing. ``None`` says that the name, or a document, is not in the store.

    :raises ImageNotFound: the name stands for an image without this platform.
    :raises MalformedError: a document is damaged.
    :raises NotSupported: the name stands for something else than an image of layers.
    """
    top = _recorded(store, reference)
    search = choose([] if top is None else [top], reference, platform)
    if top is None:
        return None
    try:
        wanted = next(search)
        while True:
            wanted = search.send(_stored(store, wanted))
    except _Absent:
        return None
    except StopIteration as stop:
        found: Choice = stop.value
        return found


async def _note_digest(store: ContentStore, reference: Reference) -> None:
    """Record an image that was found by its digest, so that it outlives its other names."""
    if reference.digest is not None and store.record(name_of(reference)) is None:
        top = _recorded(store, reference)
        if top is not None:
            await store.set_record(name_of(reference), top)


async def _in_store(
    store: ContentStore,
    lease: Lease,
    reference: Reference,
    platform: Platform,
    policy: PullPolicy,
) -> Choice | None:
    """Find the image if the store has all of it; give ``None`` if the registry may be asked."""
    why = "it is not in the image store"
    try:
        choice = find_pulled(store, reference, platform)
    except ImageNotFound as error:
        if reference.digest is not None:
            raise  # what a digest stands for does not change
        choice, why = None, error.reason
    except MalformedError:
        if policy is PullPolicy.NEVER:
            raise
        return None  # the registry sends again what is damaged here
    if choice is not None:
        wanted = [choice.manifest, *(layer for layer, _ in choice.layers)]
        top = _recorded(store, reference)
        await lease.keep(
            *(descriptor.digest for descriptor in wanted), *([top.digest] if top else [])
        )
        if all(store.has(descriptor) for descriptor in wanted):
            return choice
        why = "some of its layers are not in the image store"
    if policy is PullPolicy.NEVER:
        raise ImageNotFound(
            str(reference),
            f"{why}, and the pull policy is never; get it with trio-supermachine pull"
            f" {name_of(reference)}, or allow to pull it",
        )
    return None


def _recorded(store: ContentStore, reference: Reference) -> Descriptor | None:
    """Find the index or manifest that a reference stands for; a digest stands for itself."""
    if reference.digest is None:
        record = store.record(name_of(reference))
        return None if record is None else record.top
    data = _read(store, reference.digest)
    return None if data is None else _described(data, reference.digest)


def _read(store: ContentStore, digest: str) -> bytes | None:
    """Read a document, which is not checked; ``None`` if it is not here, or too large for one."""
    try:
        path = store.path(digest)
        # A registry may well name a layer's digest here.
        return None if path.stat().st_size > MAX_DOCUMENT else path.read_bytes()
    except FileNotFoundError:
        return None


def _described(data: bytes, digest: str) -> Descriptor:
    """Describe an index or manifest by what it says of itself."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None  # the parser reports it
    found = document if isinstance(document, dict) else {}
    kind = found.get("mediaType")
    if kind not in (*INDEXES, *MANIFESTS):
        kind = INDEXES[0] if "manifests" in found else MANIFESTS[0]
    return Descriptor(media_type=kind, digest=digest, size=len(data))


def _stored(store: ContentStore, descriptor: Descriptor) -> bytes:
    if descriptor.data is None and not store.has(descriptor):
        raise _Absent
    return read_document(store, descriptor)


async def _top(store: ContentStore, lease: Lease, registry: Registry, digest: str) -> Descriptor:
    """Describe the index or manifest of this digest, and bring it into the store."""
    await lease.keep(digest)
    data = _read(store, digest)
    if data is None or sha256(data) != digest:
        data = (await registry.manifest(digest)).data
        await store.put(data)
    return _described(data, digest)


class _Documents:
    """Documents of one pull: from the store, or from the registry into the store."""

    def __init__(self, store: ContentStore, lease: Lease, registry: Registry) -> None:
        self._store = store
        self._lease = lease
        self._registry = registry

    async def get(self, descriptor: Descriptor) -> bytes:
        if descriptor.size > MAX_DOCUMENT:
            raise MalformedError(f"a document of {descriptor.size} bytes is too large")
        await self._lease.keep(descriptor.digest)
        try:
            data = _stored(self._store, descriptor)
        except (_Absent, MalformedError):
            data = await self._fetch(descriptor)
            if sha256(data) != descriptor.digest:
                raise MalformedError(
                    f"what came as {descriptor.digest} has the digest {sha256(data)}"
                ) from None
        if len(data) != descriptor.size:
            raise MalformedError(
                f"the document {descriptor.digest} has {len(data)} bytes, not {descriptor.size}"
            )
        await self._store.put(data)
        return data

    async def _fetch(self, descriptor: Descriptor) -> bytes:
        if descriptor.media_type in (*INDEXES, *MANIFESTS):
            return (await self._registry.manifest(descriptor.digest)).data
        async with self._registry.blob(descriptor.digest, descriptor.size) as chunks:
            return b"".join([chunk async for chunk in chunks])


async def _drive(search: Search[Choice], get: _Get) -> Choice:
    try:
        wanted = next(search)
        while True:
            wanted = search.send(await get(wanted))
    except StopIteration as stop:
        found: Choice = stop.value
        return found


def _refuse_large(reference: Reference, choice: Choice) -> None:
    for layer, _ in choice.layers:
        if layer.size > max_layer():
            raise ImageCorrupt(
                str(reference),
                f"the layer {layer.digest} has {layer.size} bytes, more than the limit of"
                f" {max_layer()}; {VARIABLE} sets another",
            )
    if choice.size > max_image():
        raise ImageCorrupt(
            str(reference),
            f"its layers have {choice.size} bytes, more than the limit of {max_image()}, which is"
            f" four times that of a layer; {VARIABLE} sets another",
        )


def _arriving(choice: Choice, download: Download) -> LocalImage:
    layers = tuple(
        LayerSource(download.blob(layer), layer.digest, diff_id, checked=True)
        for layer, diff_id in choice.layers
    )
    return LocalImage(choice.manifest.digest, choice.configuration.config, layers)
