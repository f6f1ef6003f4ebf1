"""Archives of images: OCI archives out of the content store, OCI and docker archives into it."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import trio

from .._util.progress import ProgressCallback, report
from ..errors import ConfigError, ImageCorrupt, ImageNotFound, NotSupported, ReferenceInvalid
from ..host import files as hostfiles
from ..images.arrival import Arrival, full_disk
from ..images.content import ContentStore, Lease
from ..images.limits import max_layer
from ..images.pull import name_of
from ..images.records import CONTAINERD_NAME, Named, Record, named_in, write_index
from ..oci import MalformedError
from ..oci.blobs import MAX_DOCUMENT, Archive, read_bytes, sha256
from ..oci.decompress import CHUNK, Blob, open_layer, opened
from ..oci.documents import CONFIGS, INDEXES, MANIFESTS, Descriptor, read_configuration
from ..oci.manifest import (
    REF_NAME,
    find_blob,
    read_document,
    read_saved,
    read_tops,
    saved_configuration,
    saved_images,
    saved_names,
)
from ..oci.reference import Reference, Transport

_MAX_DEPTH: Final = 4  # of indexes in indexes
_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"


async def save(
    dest: Path | BinaryIO, references: Sequence[str], *, store: ContentStore | None = None
) -> tuple[Record, ...]:
    """Write an OCI archive of images in the content store. They keep their digests.

    An image for several platforms is written with the platforms that are here. A file at ``dest``
    appears when it is complete; cancellation leaves none.

    :param dest: a path, or an open file to write to.
    :param references: the images, as references to registries.
    :raises ConfigError: there is a directory or a device at the path.
    :raises ReferenceInvalid: a reference is no reference to a registry.
    :raises ImageNotFound: an image is not in the store, or not all of it.
    :raises DiskFull: there is no room for the archive.
    """
    store = store or ContentStore()
    async with store.lease() as lease:
        records = {}
        for text in references:
            record = _recorded(store, text)
            records[record.name] = record
        digests: dict[str, None] = {}
        for record in records.values():
            below = store.below(record.top)
            await lease.keep(*below)
            found = _whole(store, record.top)
            if record.top.digest not in found:
                raise ImageNotFound(record.name, "parts of it are missing; pull it again")
            digests.update(dict.fromkeys(found))
        await trio.to_thread.run_sync(_save, store, dest, list(records.values()), list(digests))
    return tuple(records.values())


def _recorded(store: ContentStore, text: str) -> Record:
    reference = Reference.parse(text)
    if reference.transport is not Transport.DOCKER:
        raise ReferenceInvalid(text, "only images that were pulled or loaded can be saved")
    record = store.record(name_of(reference))
    if record is None:
        raise ImageNotFound(text, "it is not in the image store; see trio-supermachine images")
    return record


def _whole(store: ContentStore, top: Descriptor) -> list[str]:
    """Find the blobs of an image that are here, without manifests of which a part is missing."""
    found: dict[str, bool] = {}  # each blob that was looked at, and whether it is whole

    def look(digest: str, kind: str, depth: int) -> bool:
        if digest not in found:
            found[digest] = False
            found[digest] = depth <= _MAX_DEPTH and whole(digest, kind, depth)
        return found[digest]

    def whole(digest: str, kind: str, depth: int) -> bool:
        path = store.path(digest)
        if not path.exists():
            return _foreign(kind)
        if kind not in (*INDEXES, *MANIFESTS) or path.stat().st_size > MAX_DOCUMENT:
            return True
        named = named_in(path.read_bytes())
        below = [look(each.digest, each.media_type, depth + 1) for each in named]
        return any(below) if kind in INDEXES else all(below)

    look(top.digest, top.media_type, 0)
    return [digest for digest, there in found.items() if there and store.path(digest).exists()]


def _foreign(media_type: str) -> bool:
    return Descriptor(media_type=media_type, digest="", size=0).foreign


def _save(
    store: ContentStore, dest: Path | BinaryIO, records: list[Record], digests: list[str]
) -> None:
    if isinstance(dest, Path):
        if dest.exists() and not dest.is_file():
            raise ConfigError(f"{dest} is not a regular file, and is not replaced; give another")
        with full_disk(dest), hostfiles.new_file(dest.absolute()) as new, new.open("wb") as file:
            _write(store, file, records, digests)
            new.chmod(0o644)
    else:
        _write(store, dest, records, digests)


def _write(store: ContentStore, file: BinaryIO, records: list[Record], digests: list[str]) -> None:
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        layout = b'{"imageLayoutVersion": "1.0.0"}'
        index = write_index(records).encode()
        for name, data in (("oci-layout", layout), ("index.json", index)):
            archive.addfile(_member(name, len(data)), io.BytesIO(data))
        for digest in digests:
            path = store.path(digest)
            with path.open("rb") as blob:
                size = os.fstat(blob.fileno()).st_size
                archive.addfile(
                    _member("blobs/" + digest.replace(":", "/"), size), _Cancellable(blob)
                )


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


class _Cancellable(io.RawIOBase):
    """A file whose reader, in a worker thread of Trio's, can be cancelled."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        trio.from_thread.check_cancelled()
        return self._file.read(size)


async def load(
    path: Path,
    *,
    name: str | None = None,
    store: ContentStore | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[str, ...]:
    """Bring the images of an OCI or docker archive into the content store, and give their names.

    After cancellation, or an error, blobs may be left, which :meth:`ContentStore.collect` removes.

    :param name: the name of the image, for an archive of one image, instead of its own.
    :raises ImageNotFound: there is no such archive, or it has an image without a name.
    :raises ImageCorrupt: it is damaged, or a digest in it is wrong.
    :raises NotSupported: it has something else than images.
    :raises DiskFull: there is no room for the images.
    """
    store = store or ContentStore()
    reference = Reference(Transport.OCI_ARCHIVE, str(path))
    if name is not None:
        name = name_of(_proper(name))
    try:
        archive = await trio.to_thread.run_sync(_opened, path)
        async with store.lease() as lease:
            loader = _Loader(store, archive, reference, lease, progress)
            if archive.find("index.json") is not None:
                images = await loader.layout()
            else:
                images = await loader.docker()
            named = list(_named(images, reference, name))
            for each, top in named:
                await store.set_record(each, top)
    except MalformedError as error:
        raise ImageCorrupt(str(path), str(error)) from error
    return tuple(each for each, _ in named)


def _opened(path: Path) -> Archive:
    if not path.is_file():
        raise ImageNotFound(str(path), "there is no such file")
    return Archive(path.absolute())


def _proper(name: str, digest: str | None = None) -> Reference:
    """Parse the name of an image to load. It may have a digest if that is the image's own."""
    reference = Reference.parse(name)
    if reference.transport is not Transport.DOCKER or reference.digest not in (None, digest):
        raise ReferenceInvalid(name, "this must be a name like example.com/app:1.0")
    return reference


_Image = tuple[Descriptor, list[str]]  # an index or manifest, and the names that it has


def _named(
    images: list[_Image], reference: Reference, name: str | None
) -> Iterator[tuple[str, Descriptor]]:
    if not images:
        raise ImageNotFound(str(reference), "it has no image")
    if name is not None:
        if len({top.digest for top, _ in images}) != 1:
            raise ImageNotFound(str(reference), f"it has {len(images)} images; leave the name out")
        yield name, images[0][0]
        return
    for top, names in images:
        if not names:
            raise ImageNotFound(
                str(reference), "it has an image without a name; give one with --name"
            )
        for text in names:
            try:
                yield name_of(_proper(text, top.digest)), top
            except ReferenceInvalid as error:
                raise ImageNotFound(
                    str(reference),
                    f"it has an image with the improper name {text[:256]!r}; give one with --name",
                ) from error


class _Loader:
    """Copies the images of one archive into the store."""

    def __init__(
        self,
        store: ContentStore,
        archive: Archive,
        reference: Reference,
        lease: Lease,
        progress: ProgressCallback | None,
    ) -> None:
        self._store = store
        self._archive = archive
        self._reference = reference
        self._lease = lease
        self._progress = progress
        self._images: dict[str, bool] = {}  # documents, and whether each has an image

    async def layout(self) -> list[_Image]:
        """Copy the images of an OCI layout."""
        images = []
        for top in read_tops(self._archive, self._reference):
            if top.media_type not in (*INDEXES, *MANIFESTS):
                raise NotSupported(
                    "artifacts",
                    f"{self._reference} has something of the media type {top.media_type}, which"
                    " is no image; make an archive of images alone",
                )
            if not await self._document(top):
                raise MalformedError(f"{top.digest} is missing, or every image that it names")
            # containers/image writes a mere tag if the layout has one image: that is no name.
            stated = top.annotations.get(CONTAINERD_NAME) or top.annotations.get(REF_NAME)
            full = stated is not None and (":" in stated or "/" in stated)
            images.append((top, [stated] if stated is not None and full else []))
        return images

    async def _document(self, descriptor: Descriptor, depth: int = 0) -> bool:
        """Copy a document, and all below it that the archive has. Give whether it has any image."""
        digest = descriptor.digest
        if digest not in self._images:
            if depth > _MAX_DEPTH:
                raise MalformedError("indexes are nested too deeply")
            if find_blob(self._archive, descriptor) is None:
                return False
            await self._lease.keep(digest)
            data = read_document(self._archive, descriptor)
            below = [await self._named(named, depth + 1) for named in named_in(data)]
            await self._store.put(data)
            self._images[digest] = descriptor.media_type in MANIFESTS or any(below)
        return self._images[digest]

    async def _named(self, named: Named, depth: int) -> bool:
        blob = self._archive.find("blobs/" + named.digest.replace(":", "/"))
        size = 0 if blob is None else blob.size
        child = Descriptor(media_type=named.media_type, digest=named.digest, size=size)
        if named.document:
            return await self._document(child, depth)
        if blob is not None:
            await self._blob(named.digest, blob)
        elif not child.foreign:
            raise MalformedError(f"the blob {named.digest} is missing")
        return False

    async def _blob(self, digest: str, blob: Blob) -> None:
        if blob.size > max_layer():
            raise MalformedError(f"the blob {digest} has {blob.size} bytes, which is too large")
        await self._lease.keep(digest)
        arrival = Arrival()
        await report(self._progress, "load", digest, 0, blob.size)
        try:
            async with self._store.receiving(digest, blob.size, arrival) as writer:
                if writer is not None:
                    with opened(blob) as file:
                        while writer.done < blob.size:
                            count = min(CHUNK, blob.size - writer.done)
                            place = blob.offset + writer.done
                            data = os.pread(file.fileno(), count, place)
                            if not data:
                                raise MalformedError(f"{blob.path} is shorter than it was")
                            await writer.write(data)
        finally:
            arrival.close()
        await report(self._progress, "load", digest, blob.size, blob.size)

    async def docker(self) -> list[_Image]:
        """Copy the images of a docker archive. They have no manifests, so make these."""
        images = []
        for saved in saved_images(self._archive, self._reference):
            configuration = saved_configuration(self._archive, saved)
            read_configuration(configuration)
            await self._lease.keep(sha256(configuration))
            await self._store.put(configuration)
            layers = []
            for source in read_saved(self._archive, saved, self._reference, None).layers:
                digest, diff_id, kind = await trio.to_thread.run_sync(_examine, source.blob)
                source.check(digest, diff_id)
                await self._blob(digest, source.blob)
                layers.append(_describe(kind, digest, source.blob.size))
            manifest = json.dumps(
                {
                    "schemaVersion": 2,
                    "mediaType": MANIFESTS[0],
                    "config": _describe(CONFIGS[0], sha256(configuration), len(configuration)),
                    "layers": layers,
                }
            ).encode()
            await self._lease.keep(sha256(manifest))
            digest = await self._store.put(manifest)
            top = Descriptor(media_type=MANIFESTS[0], digest=digest, size=len(manifest))
            images.append((top, saved_names(saved)))
        return images


def _describe(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest, "size": size}


def _examine(blob: Blob) -> tuple[str, str, str]:
    """Read a layer: give its digest, its diff_id and its media type."""
    with open_layer(blob, max_layer(), trio.from_thread.check_cancelled) as (stored, layer):
        diff_id = layer.digest()
        digest = stored.digest()
    if digest == diff_id:
        return digest, diff_id, _LAYER
    magic = read_bytes(Blob(blob.path, blob.offset, 2))
    return digest, diff_id, _LAYER + ("+gzip" if magic == b"\x1f\x8b" else "+zstd")
