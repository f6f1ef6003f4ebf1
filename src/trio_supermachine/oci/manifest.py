"""From a transport's files to one image: its configuration and where its layers are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from ..errors import ImageNotFound, NotSupported, ReferenceInvalid
from .blobs import Files, as_digest, as_list, as_object, read_bytes, read_json, sha256
from .config import ImageConfig
from .decompress import Blob
from .malformed import MalformedError
from .platform import Platform
from .reference import Reference, normalise_name

MAX_LAYERS = 127  # Docker's own limit
_MAX_MANIFESTS = 4096
_MAX_DEPTH = 4
_REF_NAME = "org.opencontainers.image.ref.name"
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_CONFIGS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
_LAYER = re.compile(
    r"application/vnd\.(?:oci\.image\.layer\.(?:nondistributable\.)?v1\.tar(?:\+gzip|\+zstd)?"
    r"|docker\.image\.rootfs\.(?:foreign\.)?diff\.tar(?:\.gzip|\.zstd)?)"
)


@attrs.frozen
class LayerSource:
    """A layer's blob; ``digest`` is the blob's, if the transport has one."""

    blob: Blob
    digest: str | None
    diff_id: str

    def check(self, digest: str, diff_id: str) -> None:
        """Compare with what was found. :raises MalformedError: a digest differs."""
        if self.digest is not None and digest != self.digest:
            raise MalformedError(f"the blob {self.digest} has the digest {digest}")
        if diff_id != self.diff_id:
            raise MalformedError(f"the layer {self.diff_id} has the diff_id {diff_id}")


@attrs.frozen
class LocalImage:
    """An image as it was found: :attr:`digest` is its manifest's, or its configuration's."""

    digest: str
    config: ImageConfig
    layers: tuple[LayerSource, ...]


def find_in_layout(files: Files, reference: Reference, platform: Platform) -> LocalImage:
    """Find an image in an OCI layout.

    :raises ImageNotFound: there is no such image, or not for this platform.
    :raises MalformedError: a document is damaged or lies about its digest.
    """
    index = files.find("index.json")
    if index is None or files.find("oci-layout") is None:
        raise ImageNotFound(str(reference), "there is no OCI layout (no oci-layout or index.json)")
    document = as_object(read_json(read_bytes(index), "index.json"), "index.json")
    tops = _descriptors(document, "manifests", _MAX_MANIFESTS)
    chosen = _tagged(tops, reference)
    offered: dict[str, None] = {}
    for descriptor in _leaves(files, chosen, offered, 0):
        stated = Platform.of(descriptor.get("platform"))
        if platform.accepts(stated):
            image, actual = _from_manifest(files, descriptor, platform)
            if image is not None:
                return image
            offered[str(actual)] = None
    raise _no_platform(reference, platform, offered)


def find_in_docker_archive(files: Files, reference: Reference, platform: Platform) -> LocalImage:
    """Find an image in the output of ``docker save``; raises as :func:`find_in_layout` does."""
    manifest = files.find("manifest.json")
    if manifest is None:
        raise ImageNotFound(str(reference), "there is no docker archive (no manifest.json)")
    images = [
        as_object(item, "an image of manifest.json")
        for item in as_list(
            read_json(read_bytes(manifest), "manifest.json"), "manifest.json", _MAX_MANIFESTS
        )
    ]
    found = _saved(images, reference)
    data = read_bytes(_member(files, found.get("Config"), "Config"))
    digest = sha256(data)
    stem = str(found["Config"]).rpartition("/")[2].removesuffix(".json")
    if re.fullmatch("[0-9a-f]{64}", stem) and digest != "sha256:" + stem:
        raise MalformedError(f"the configuration {stem} has the digest {digest}")
    config, diff_ids, actual = _read_config(data)
    if not platform.accepts(actual):
        raise _no_platform(reference, platform, {str(actual): None})
    names = as_list(found.get("Layers"), "Layers", MAX_LAYERS)
    blobs = [_member(files, name, "Layers") for name in names]
    return LocalImage(digest, config, _layers([(blob, None) for blob in blobs], diff_ids))


def _saved(images: list[Mapping[str, Any]], reference: Reference) -> Mapping[str, Any]:
    tags = [as_list(image.get("RepoTags") or [], "RepoTags", _MAX_MANIFESTS) for image in images]
    listed = ", ".join(str(tag)[:256] for each in tags for tag in each) or "none with a tag"
    if reference.tag is None:
        if len(images) == 1:
            return images[0]
        raise ImageNotFound(str(reference), f"name one of {len(images)} images: {listed}")
    if reference.tag.startswith("@"):
        return _numbered(images, reference)
    for image, names in zip(images, tags, strict=True):
        if any(isinstance(n, str) and _same_name(n, reference.tag) for n in names):
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


def _numbered(items: list[Mapping[str, Any]], reference: Reference) -> Mapping[str, Any]:
    assert reference.tag is not None
    number = int(reference.tag[1:])
    if number >= len(items):
        raise ImageNotFound(str(reference), f"there are {len(items)} images, counted from 0")
    return items[number]


def _tagged(tops: list[Mapping[str, Any]], reference: Reference) -> list[Mapping[str, Any]]:
    tags = [_ref_name(top) for top in tops]
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


def _ref_name(descriptor: Mapping[str, Any]) -> str | None:
    annotations = descriptor.get("annotations")
    name = annotations.get(_REF_NAME) if isinstance(annotations, dict) else None
    return name if isinstance(name, str) else None


def _leaves(
    files: Files, descriptors: list[Mapping[str, Any]], offered: dict[str, None], depth: int
) -> Iterator[Mapping[str, Any]]:
    """The manifests below some descriptors, through indexes; notes their platforms."""
    if depth > _MAX_DEPTH:
        raise MalformedError("indexes are nested too deeply")
    for descriptor in descriptors:
        kind = descriptor.get("mediaType")
        if kind in _INDEXES:
            document = as_object(read_json(_document(files, descriptor), "an index"), "an index")
            below = _descriptors(document, "manifests", _MAX_MANIFESTS)
            yield from _leaves(files, below, offered, depth + 1)
        elif kind in _MANIFESTS:
            if (stated := Platform.of(descriptor.get("platform"))) is not None:
                offered[str(stated)] = None
            yield descriptor


def _from_manifest(
    files: Files, descriptor: Mapping[str, Any], platform: Platform
) -> tuple[LocalImage | None, Platform | None]:
    """The image of a manifest, or its true platform if that is not the one wanted."""
    manifest = as_object(read_json(_document(files, descriptor), "a manifest"), "a manifest")
    about = as_object(manifest.get("config"), "a manifest's config")
    if about.get("mediaType") not in _CONFIGS:
        raise NotSupported("artifacts", "this is an OCI artifact, not an image to run")
    config, diff_ids, actual = _read_config(_document(files, about))
    if not platform.accepts(actual):
        return None, actual
    sources: list[tuple[Blob, str | None]] = []
    for layer in _descriptors(manifest, "layers", MAX_LAYERS):
        kind = layer.get("mediaType")
        if not isinstance(kind, str) or not _LAYER.fullmatch(kind):
            raise NotSupported("layers", f"layers of the media type {kind!r} are not supported")
        sources.append((_blob(files, layer), as_digest(layer.get("digest"), "a layer's digest")))
    digest = as_digest(descriptor.get("digest"), "a manifest's digest")
    return LocalImage(digest, config, _layers(sources, diff_ids)), actual


def _layers(sources: list[tuple[Blob, str | None]], diff_ids: list[str]) -> tuple[LayerSource, ...]:
    if not sources:
        raise MalformedError("the image has no layers")
    if len(sources) != len(diff_ids):
        raise MalformedError(f"{len(sources)} layers have {len(diff_ids)} diff_ids")
    return tuple(LayerSource(*source, d) for source, d in zip(sources, diff_ids, strict=True))


def _read_config(data: bytes) -> tuple[ImageConfig, list[str], Platform | None]:
    what = "the image configuration"
    document = as_object(read_json(data, what), what)
    rootfs = as_object(document.get("rootfs"), what + "'s rootfs")
    listed = as_list(rootfs.get("diff_ids"), what + "'s diff_ids", MAX_LAYERS)
    diff_ids = [as_digest(item, "a diff_id") for item in listed]
    return ImageConfig.from_json(document.get("config")), diff_ids, Platform.of(document)


def _descriptors(document: Mapping[str, Any], key: str, limit: int) -> list[Mapping[str, Any]]:
    return [as_object(i, f"one of {key}") for i in as_list(document.get(key), key, limit)]


def _blob(files: Files, descriptor: Mapping[str, Any]) -> Blob:
    digest = as_digest(descriptor.get("digest"), "a descriptor's digest")
    blob = files.find("blobs/" + digest.replace(":", "/"))
    if blob is None:
        raise MalformedError(f"the blob {digest} is missing")
    if descriptor.get("size") != blob.size:
        raise MalformedError(
            f"the blob {digest} has {blob.size} bytes, not {descriptor.get('size')!r}"
        )
    return blob


def _document(files: Files, descriptor: Mapping[str, Any]) -> bytes:
    data = read_bytes(_blob(files, descriptor))
    if (actual := sha256(data)) != descriptor["digest"]:
        raise MalformedError(f"the blob {descriptor['digest']} has the digest {actual}")
    return data


def _no_platform(
    reference: Reference, platform: Platform, offered: Mapping[str, None]
) -> ImageNotFound:
    there = ", ".join(o for o in list(offered)[:32] if o != "unknown/unknown") or "nothing to run"
    return ImageNotFound(str(reference), f"there is none for {platform}, but {there}")
