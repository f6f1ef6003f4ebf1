"""The JSON documents of an image: descriptors, indexes, manifests and configurations.

They follow the OCI image specification 1.1, and its ancestor, Docker's schema 2. Strangers wrote
them: every type and bound of a field that is used is checked, and other fields, such as dates, are
left alone. :mod:`.manifest` decides which documents are read.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

import attrs

from ..errors import NotSupported
from . import MalformedError
from .blobs import as_list, as_object, is_digest, read_json
from .config import ImageConfig
from .platform import Platform

MAX_LAYERS = 127  # Docker's own limit
MAX_MANIFESTS = 4096
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CONFIGS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
#: Media types of configurations from Docker's early years, which Docker still takes.
_OLD_CONFIGS = ("application/octet-stream", "application/json", "text/html", "text/plain")
_RESTRICTED = r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}"  # RFC 6838
_MEDIA_TYPE = re.compile(rf"{_RESTRICTED}/{_RESTRICTED}")
_LAYER = re.compile(
    r"application/vnd\.(?:oci\.image\.layer\.(?P<oci>nondistributable\.)?v1\.tar(?:\+gzip|\+zstd)?"
    r"|docker\.image\.rootfs\.(?P<docker>foreign\.)?diff\.tar(?:\.gzip|\.zstd)?)"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:.+")
_MAX_SIZE = (1 << 63) - 1
_MAX_URLS = 64


@attrs.frozen(kw_only=True)
class Descriptor:
    """A document's description of another blob (OCI image specification, descriptors).

    :ivar size: the blob's size in bytes.
    :ivar data: the blob itself, if the descriptor embeds it; its digest has not been checked.
    """

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = attrs.field(factory=dict, hash=False)
    artifact_type: str | None = None
    urls: tuple[str, ...] = ()
    data: bytes | None = attrs.field(default=None, repr=False)

    @property
    def foreign(self) -> bool:
        """Whether this is a layer that registries need not have (``nondistributable``)."""
        match = _LAYER.fullmatch(self.media_type)
        return match is not None and bool(match["oci"] or match["docker"])

    @classmethod
    def from_json(cls, document: object, what: str) -> Descriptor:
        """Parse a descriptor.

        :param what: the descriptor, for messages.
        :raises MalformedError: it is no descriptor.
        """
        found = as_object(document, what)
        media_type = found.get("mediaType")
        if not isinstance(media_type, str) or not _MEDIA_TYPE.fullmatch(media_type):
            raise MalformedError(f"{what} has no proper media type")
        digest = found.get("digest")
        if not isinstance(digest, str) or not is_digest(digest):
            raise MalformedError(f"{what} has no proper digest")
        size = found.get("size")
        if type(size) is not int or not 0 <= size <= _MAX_SIZE:
            raise MalformedError(f"{what} has no proper size")
        return cls(
            media_type=media_type,
            digest=digest,
            size=size,
            platform=_platform(found, what),
            annotations=_annotations(found, what),
            artifact_type=_media_type(found.get("artifactType"), what),
            urls=_urls(found, what),
            data=_data(found, what, size),
        )


@attrs.frozen(kw_only=True)
class Manifest:
    """One image: its configuration and its layers, the lowest first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@attrs.frozen(kw_only=True)
class Configuration:
    """An image's configuration: settings to run it, its layers' diff_ids, and its platform."""

    config: ImageConfig
    diff_ids: tuple[str, ...]
    platform: Platform | None


def read_index(data: bytes, what: str = "an index") -> tuple[Descriptor, ...]:
    """Parse an index, or an OCI layout's ``index.json``, into its descriptors, in their order.

    :raises MalformedError: it is no index, or could be taken for a manifest, too.
    """
    document = _versioned(data, what, INDEXES)
    if "layers" in document or "config" in document:
        raise MalformedError(f"{what} has layers like a manifest")
    listed = as_list(document.get("manifests"), f"{what}'s manifests", MAX_MANIFESTS)
    return tuple(Descriptor.from_json(item, f"an entry of {what}") for item in listed)


def read_manifest(data: bytes) -> Manifest:
    """Parse a manifest. Refuse layers of an unknown kind now, before anything is fetched.

    :raises MalformedError: it is no manifest, or could be taken for an index, too.
    :raises NotSupported: it is the manifest of an artifact, or has other layers than tar files.
    """
    what = "a manifest"
    document = _versioned(data, what, MANIFESTS)
    if "manifests" in document:
        raise MalformedError(f"{what} has manifests like an index")
    about = as_object(document.get("config"), f"{what}'s config")
    # Docker takes a configuration without a type, or with a server's default, for an image's.
    kind = about.get("mediaType") or _OLD_CONFIGS[0]
    config = Descriptor.from_json({**about, "mediaType": kind}, f"{what}'s config")
    listed = as_list(document.get("layers"), f"{what}'s layers", MAX_LAYERS)
    layers = tuple(Descriptor.from_json(layer, f"a layer of {what}") for layer in listed)
    artifact = _media_type(document.get("artifactType"), what)
    if config.media_type not in (*CONFIGS, *_OLD_CONFIGS):
        raise NotSupported(
            "artifacts",
            "this is an OCI artifact, not an image to run"
            f" (its type is {artifact or config.media_type})",
        )
    for layer in layers:
        if not _LAYER.fullmatch(layer.media_type):
            raise NotSupported(
                "layers",
                f"layers of the media type {layer.media_type!r} are not supported; build the"
                " image with layers that are tar files, plain or compressed by gzip or zstd",
            )
    if not layers:
        raise MalformedError("the image has no layers")
    if len({layer.digest for layer in layers}) != len({(x.digest, x.size) for x in layers}):
        raise MalformedError("the image has a layer of two sizes")
    return Manifest(config=config, layers=layers)


def read_configuration(data: bytes) -> Configuration:
    """Parse an image's configuration.

    :raises MalformedError: it is no configuration.
    """
    what = "the image configuration"
    document = as_object(read_json(data, what), what)
    rootfs = as_object(document.get("rootfs"), what + "'s rootfs")
    if rootfs.get("type", "layers") != "layers":
        raise MalformedError(what + "'s rootfs is not made of layers")
    listed = as_list(rootfs.get("diff_ids"), what + "'s diff_ids", MAX_LAYERS)
    for item in listed:
        if not isinstance(item, str) or not is_digest(item):
            raise MalformedError("a diff_id is not a digest")
    if document.get("history") is not None:
        for step in as_list(document["history"], what + "'s history", MAX_MANIFESTS):
            as_object(step, "a step of " + what + "'s history")
    return Configuration(
        config=ImageConfig.from_json(document.get("config")),
        diff_ids=tuple(listed),
        platform=Platform.of(document),
    )


def read_layout(data: bytes) -> None:
    """Check an OCI layout's file ``oci-layout``.

    :raises MalformedError: it is no such file.
    :raises NotSupported: the layout has another version.
    """
    version = as_object(read_json(data, "oci-layout"), "oci-layout").get("imageLayoutVersion")
    if not isinstance(version, str):
        raise MalformedError("oci-layout names no version")
    if version != "1.0.0":
        raise NotSupported("layouts", f"OCI layouts of version {version[:40]!r} are not supported")


def foreign_missing(layer: Descriptor) -> NotSupported:
    """Make the error for a ``foreign`` layer whose blob is not where the image is."""
    where = f" (it is said to be at {', '.join(layer.urls)[:400]})" if layer.urls else ""
    return NotSupported(
        "foreign layers",
        f"the layer {layer.digest} of the media type {layer.media_type!r} is not distributed with"
        f" the image{where}; foreign layers are not fetched from other places",
    )


def _versioned(data: bytes, what: str, kinds: tuple[str, ...]) -> Mapping[str, Any]:
    document = as_object(read_json(data, what), what)
    version = document.get("schemaVersion")
    if version == 1:
        raise NotSupported(
            "schema 1", f"{what} has Docker's old schema 1; push the image again with a newer tool"
        )
    if type(version) is not int or version != 2:
        raise MalformedError(f"{what} has no proper schemaVersion")
    if document.get("mediaType") not in (None, "", *kinds):
        raise MalformedError(f"{what} has the media type of something else")
    return document


def _platform(found: Mapping[str, Any], what: str) -> Platform | None:
    stated = found.get("platform")
    if stated is None:
        return None
    platform = as_object(stated, f"the platform of {what}")
    if not all(isinstance(platform.get(key), str) for key in ("os", "architecture")):
        raise MalformedError(f"the platform of {what} has no os or architecture")
    return Platform.of(platform)


def _annotations(found: Mapping[str, Any], what: str) -> Mapping[str, str]:
    stated = found.get("annotations")
    if stated is None:
        return {}
    annotations = as_object(stated, f"the annotations of {what}")
    if not all(isinstance(value, str) for value in annotations.values()):
        raise MalformedError(f"the annotations of {what} are not all strings")
    return annotations


def _media_type(value: object, what: str) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not _MEDIA_TYPE.fullmatch(value):
        raise MalformedError(f"{what} has no proper artifact type")
    return value


def _urls(found: Mapping[str, Any], what: str) -> tuple[str, ...]:
    if found.get("urls") is None:
        return ()
    urls = as_list(found["urls"], f"the urls of {what}", _MAX_URLS)
    if not all(isinstance(url, str) and url.isprintable() and _URL.fullmatch(url) for url in urls):
        raise MalformedError(f"{what} has a malformed URL")
    return tuple(urls)


def _data(found: Mapping[str, Any], what: str, size: int) -> bytes | None:
    stated = found.get("data")
    if stated is None:
        return None
    try:
        data = base64.b64decode(stated, validate=True) if isinstance(stated, str) else None
    except (binascii.Error, ValueError):
        data = None
    if data is None or len(data) != size:
        raise MalformedError(f"{what} embeds data that are not its {size} bytes")
    return data
