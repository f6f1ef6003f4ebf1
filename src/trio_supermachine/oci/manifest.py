"""The choice of one image among those of a layout, an archive or a registry.

:func:`choose` decides, without I/O. It is a generator that yields the descriptor of each document
that it needs, and is sent the document. Its driver reads documents from a directory or an archive
(:func:`drive`), or from the content store and a registry; the driver checks digests and sizes. The
search is bounded in the number and the size of documents, and in the depth of indexes.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import attrs

from ..errors import ImageNotFound, ReferenceInvalid
from . import MalformedError
from .blobs import Files, as_digest, as_list, as_object, read_bytes, read_json, sha256
from .config import ImageConfig
from .decompress import Blob
from .documents import (
    INDEXES,
    MANIFESTS,
    MAX_LAYERS,
    MAX_MANIFESTS,
    Configuration,
    Descriptor,
    foreign_missing,
    read_configuration,
    read_index,
    read_layout,
    read_manifest,
)
from .platform import Platform
from .reference import Reference, normalise_name

#: The annotation by which a layout's index names an image.
REF_NAME = "org.opencontainers.image.ref.name"

_MAX_DEPTH = 4
_MAX_READ = 256  # documents of one search
_MAX_READ_BYTES = 64 << 20

_Found = TypeVar("_Found")
#: A generator that yields descriptors of documents, is sent the documents, whose digests and sizes
#: were checked, and returns what it was looking for.
Search = Generator[Descriptor, bytes, _Found]


@attrs.frozen
class LayerSource:
    """A layer's blob, and the digests that it has to have.

    :ivar digest: the blob's digest; ``None`` if the transport has none.
    :ivar checked: whether the blob is in the content store, which checks digests itself.
    """

    blob: Blob
    digest: str | None
    diff_id: str
    checked: bool = False

    def check(self, digest: str, diff_id: str) -> None:
        """Compare with the digests that the blob has.

        :raises MalformedError: one differs.
        """
        if self.digest is not None and digest != self.digest:
            raise MalformedError(f"the blob {self.digest} has the digest {digest}")
        if diff_id != self.diff_id:
            raise MalformedError(f"the layer {self.diff_id} has the diff_id {diff_id}")


@attrs.frozen
class LocalImage:
    """An image as it was found.

    :ivar digest: the digest of its manifest; without a manifest, of its configuration.
    """

    digest: str
    config: ImageConfig
    layers: tuple[LayerSource, ...]


@attrs.frozen(kw_only=True)
class Choice:
    """The image that was chosen, by its documents.

    :ivar layers: descriptors of its layers, with their diff_ids, the lowest first.
    """

    manifest: Descriptor
    configuration: Configuration
    layers: tuple[tuple[Descriptor, str], ...]

    @property
    def size(self) -> int:
        """Bytes of all layers as they are stored, each counted once."""
        return sum({layer.digest: layer.size for layer, _ in self.layers}.values())


@attrs.define
class _Search:
    """The state of one search: what it wants, was offered, and has read."""

    wanted: Platform
    offered: dict[str, None] = attrs.field(factory=dict)
    read: int = 0
    read_bytes: int = 0

    def ask(self, descriptor: Descriptor) -> Search[bytes]:
        as_digest(descriptor.digest, "a descriptor's digest")
        self.read += 1
        self.read_bytes += descriptor.size
        if self.read > _MAX_READ or self.read_bytes > _MAX_READ_BYTES:
            raise MalformedError("the image has too many documents, or too large ones")
        return (yield descriptor)

    def find(self, descriptors: Iterable[Descriptor], depth: int) -> Search[Choice | None]:
        if depth > _MAX_DEPTH:
            raise MalformedError("indexes are nested too deeply")
        for descriptor in sorted(descriptors, key=self._rank):
            found = None
            if descriptor.media_type in INDEXES:
                below = read_index((yield from self.ask(descriptor)))
                found = yield from self.find(below, depth + 1)
            elif descriptor.media_type in MANIFESTS:
                found = yield from self._take(descriptor)
            else:
                self.offered[f"something of the media type {descriptor.media_type}"] = None
            if found is not None:
                return found
        return None

    def _rank(self, descriptor: Descriptor) -> int:
        """Give a key that sorts the nearest of several variants first."""
        stated = descriptor.platform
        return 0 if stated is None else max(0, self.wanted.distance(stated))

    def _take(self, descriptor: Descriptor) -> Search[Choice | None]:
        stated = descriptor.platform
        if stated is not None:
            self.offered[str(stated)] = None
        if not self.wanted.accepts(stated):
            return None
        manifest = read_manifest((yield from self.ask(descriptor)))
        configuration = read_configuration((yield from self.ask(manifest.config)))
        if not self.wanted.accepts(configuration.platform):
            self.offered[str(configuration.platform)] = None
            return None
        for layer in manifest.layers:
            as_digest(layer.digest, "a layer's digest")
        layers = _paired(manifest.layers, configuration.diff_ids)
        return Choice(manifest=descriptor, configuration=configuration, layers=layers)


def choose(tops: Iterable[Descriptor], reference: Reference, platform: Platform) -> Search[Choice]:
    """Choose the first image for ``platform`` among ``tops`` and all that these name.

    :raises ImageNotFound: there is none; the message names the platforms that there are.
    :raises MalformedError: a document does not follow its format, or there are too many.
    :raises NotSupported: it is something else than an image of layers.
    """
    search = _Search(platform)
    found = yield from search.find(tops, 0)
    if found is None:
        raise _no_platform(reference, platform, search.offered)
    return found


def drive(files: Files, search: Search[_Found]) -> _Found:
    """Run a search on the documents in ``files``.

    :raises MalformedError: a document is missing, or has another digest or size.
    """
    try:
        wanted = next(search)
        while True:
            wanted = search.send(read_document(files, wanted))
    except StopIteration as stop:
        found: _Found = stop.value
        return found


def find_in_layout(files: Files, reference: Reference, platform: Platform) -> LocalImage:
    """Find an image in an OCI layout.

    :raises ImageNotFound: there is no such image, or not for this platform.
    :raises MalformedError: a document is damaged, or has another digest.
    """
    chosen = _tagged(read_tops(files, reference), reference)
    return on_disk(files, drive(files, choose(chosen, reference, platform)))


def read_tops(files: Files, reference: Reference) -> tuple[Descriptor, ...]:
    """Read the index of an OCI layout. The errors are those of :func:`find_in_layout`."""
    index, layout = files.find("index.json"), files.find("oci-layout")
    if index is None or layout is None:
        raise ImageNotFound(str(reference), "there is no OCI layout (no oci-layout or index.json)")
    read_layout(read_bytes(layout))
    return read_index(read_bytes(index), "index.json")


def on_disk(files: Files, choice: Choice, *, checked: bool = False) -> LocalImage:
    """Find the blobs of the layers of a chosen image.

    :raises MalformedError: one is missing, or has another size.
    :raises NotSupported: a missing one is a foreign layer.
    """
    layers = tuple(
        LayerSource(_layer_blob(files, layer), layer.digest, diff_id, checked)
        for layer, diff_id in choice.layers
    )
    return LocalImage(choice.manifest.digest, choice.configuration.config, layers)


def find_in_docker_archive(files: Files, reference: Reference, platform: Platform) -> LocalImage:
    """Find an image in a file of ``docker save``. Errors are those of :func:`find_in_layout`."""
    return read_saved(files, _saved(saved_images(files, reference), reference), reference, platform)


def saved_images(files: Files, reference: Reference) -> list[Mapping[str, Any]]:
    """Read the list of images in the ``manifest.json`` of ``docker save``."""
    manifest = files.find("manifest.json")
    if manifest is None:
        raise ImageNotFound(str(reference), "there is no docker archive (no manifest.json)")
    listed = read_json(read_bytes(manifest), "manifest.json")
    return [
        as_object(item, "an image of manifest.json")
        for item in as_list(listed, "manifest.json", MAX_MANIFESTS)
    ]


def saved_names(image: Mapping[str, Any]) -> list[str]:
    """Give the names of one of :func:`saved_images`."""
    names = as_list(image.get("RepoTags") or [], "RepoTags", MAX_MANIFESTS)
    return [name for name in names if isinstance(name, str)]


def saved_configuration(files: Files, image: Mapping[str, Any]) -> bytes:
    """Read the configuration of one of :func:`saved_images`, and check its digest if it has one."""
    data = read_bytes(_member(files, image.get("Config"), "Config"))
    stem = str(image["Config"]).rpartition("/")[2].removesuffix(".json")
    if re.fullmatch("[0-9a-f]{64}", stem) and sha256(data) != "sha256:" + stem:
        raise MalformedError(f"the configuration {stem} has the digest {sha256(data)}")
    return data


def read_saved(
    files: Files, image: Mapping[str, Any], reference: Reference, platform: Platform | None
) -> LocalImage:
    """Read one of :func:`saved_images`.

    :param platform: the platform that it has to be for; ``None`` takes any.
    """
    data = saved_configuration(files, image)
    found = read_configuration(data)
    if platform is not None and not platform.accepts(found.platform):
        raise _no_platform(reference, platform, {str(found.platform): None})
    names = as_list(image.get("Layers"), "Layers", MAX_LAYERS)
    blobs = [_member(files, name, "Layers") for name in names]
    if not blobs:
        raise MalformedError("the image has no layers")
    sources = [LayerSource(b, None, diff_id) for b, diff_id in _paired(blobs, found.diff_ids)]
    return LocalImage(sha256(data), found.config, tuple(sources))


def _saved(images: list[Mapping[str, Any]], reference: Reference) -> Mapping[str, Any]:
    tags = [saved_names(image) for image in images]
    listed = ", ".join(tag[:256] for each in tags for tag in each) or "none with a tag"
    if reference.tag is None:
        if len(images) == 1:
            return images[0]
        raise ImageNotFound(str(reference), f"name one of {len(images)} images: {listed}")
    if reference.tag.startswith("@"):
        return _numbered(images, reference)
    for image, names in zip(images, tags, strict=True):
        if any(_same_name(name, reference.tag) for name in names):
            return image
    raise ImageNotFound(str(reference), f"the archive has {listed}")


def _same_name(name: str, wanted: str) -> bool:
    try:
        return normalise_name(name) == wanted
    except ReferenceInvalid:
        return False


def _member(files: Files, name: object, what: str) -> Blob:
    if not isinstance(name, str):
        raise MalformedError(f"{what} does not name a file")
    blob = files.find(name)
    if blob is None:
        raise MalformedError(f"{what} names {name[:256]!r}, which is missing")
    return blob


_Item = TypeVar("_Item")


def _numbered(items: Sequence[_Item], reference: Reference) -> _Item:
    assert reference.tag is not None
    number = int(reference.tag[1:])
    if number >= len(items):
        raise ImageNotFound(str(reference), f"there are {len(items)} images, counted from 0")
    return items[number]


def _tagged(tops: Sequence[Descriptor], reference: Reference) -> Sequence[Descriptor]:
    tags = [top.annotations.get(REF_NAME) for top in tops]
    listed = ", ".join(dict.fromkeys(tag for tag in tags if tag)) or "none with a tag"
    if reference.tag is None:
        if not tops:
            raise ImageNotFound(str(reference), "the layout has no image")
        if len(set(tags)) > 1:
            raise ImageNotFound(str(reference), f"the layout has several images: {listed}")
        return tops
    if re.fullmatch("@[0-9]+", reference.tag):
        return [_numbered(tops, reference)]
    chosen = [top for top, tag in zip(tops, tags, strict=True) if tag == reference.tag]
    if not chosen:
        raise ImageNotFound(str(reference), f"the layout has {listed}")
    return chosen


def _paired(found: Sequence[_Item], diff_ids: Sequence[str]) -> tuple[tuple[_Item, str], ...]:
    if len(found) != len(diff_ids):
        raise MalformedError(f"{len(found)} layers have {len(diff_ids)} diff_ids")
    return tuple(
        (item, as_digest(diff_id, "a diff_id"))
        for item, diff_id in zip(found, diff_ids, strict=True)
    )


def find_blob(files: Files, descriptor: Descriptor) -> Blob | None:
    """Find a blob, if it is there.

    :raises MalformedError: it has another size.
    """
    as_digest(descriptor.digest, "a descriptor's digest")
    blob = files.find("blobs/" + descriptor.digest.replace(":", "/"))
    if blob is not None and descriptor.size != blob.size:
        raise MalformedError(
            f"the blob {descriptor.digest} has {blob.size} bytes, not {descriptor.size}"
        )
    return blob


def _layer_blob(files: Files, layer: Descriptor) -> Blob:
    blob = find_blob(files, layer)
    if blob is None:
        if layer.foreign:
            raise foreign_missing(layer)
        raise MalformedError(f"the blob {layer.digest} is missing")
    return blob


def read_document(files: Files, descriptor: Descriptor) -> bytes:
    """Read a document, and check its digest.

    :raises MalformedError: it is missing, or has another digest or size.
    """
    data = descriptor.data
    if data is None:
        blob = find_blob(files, descriptor)
        if blob is None:
            raise MalformedError(f"the blob {descriptor.digest} is missing")
        data = read_bytes(blob)
    if (actual := sha256(data)) != descriptor.digest:
        raise MalformedError(f"the blob {descriptor.digest} has the digest {actual}")
    return data


def _no_platform(
    reference: Reference, platform: Platform, offered: Mapping[str, None]
) -> ImageNotFound:
    there = ", ".join(o for o in list(offered)[:32] if o != "unknown/unknown")
    what = f"{there}, but nothing" if there else "nothing"
    return ImageNotFound(str(reference), f"it has {what} for {platform}")
