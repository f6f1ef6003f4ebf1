"""Records of names in the index of an OCI layout; and the blobs that a document names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

import attrs

from ..oci import MalformedError
from ..oci.blobs import is_digest
from ..oci.documents import INDEXES, Descriptor, read_index
from ..oci.manifest import REF_NAME

#: The annotation by which containerd and Docker know an image's full name.
CONTAINERD_NAME: Final = "io.containerd.image.name"
_RESOLVED: Final = "org.trio-supermachine.resolved"


@attrs.frozen(kw_only=True)
class Record:
    """The image that a name was resolved to.

    :ivar name: the name with all defaults, such as ``docker.io/library/python:3.12``.
    :ivar top: the index or manifest that it stands for.
    :ivar resolved_at: the time of that, in seconds since 1970.
    """

    name: str
    top: Descriptor
    resolved_at: float


def read_records(data: bytes) -> list[Record]:
    """Read the records in an index.

    :raises MalformedError: it was not written by :func:`write_index`.
    """
    return [_record(descriptor) for descriptor in read_index(data, "index.json")]


def write_index(records: Iterable[Record]) -> str:
    """Write the index of an OCI layout that has these images."""
    manifests = [
        {
            "mediaType": record.top.media_type,
            "digest": record.top.digest,
            "size": record.top.size,
            "annotations": {
                REF_NAME: record.name,
                CONTAINERD_NAME: record.name,
                _RESOLVED: f"{record.resolved_at:.3f}",
            },
        }
        for record in records
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": INDEXES[0], "manifests": manifests})


def _record(descriptor: Descriptor) -> Record:
    name = descriptor.annotations.get(REF_NAME)
    if name is None:
        raise MalformedError("an image has no name")
    try:
        resolved_at = float(descriptor.annotations.get(_RESOLVED, "0"))
    except ValueError:
        raise MalformedError("an image has no proper time") from None
    return Record(name=name, top=descriptor, resolved_at=resolved_at)


@attrs.frozen
class Named:
    """A blob that an index or manifest names.

    :ivar document: whether it is a document that names others in turn.
    """

    digest: str
    document: bool
    media_type: str


def named_in(data: bytes) -> list[Named]:
    """Find the blobs that an index or manifest names.

    A document of a newer kind may have fields that are not known here. The blobs that are found in
    it count, and nothing in it is an error.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return []
    if not isinstance(document, dict):
        return []
    items = [(document.get("config"), False)]
    for key, documents in (("manifests", True), ("layers", False)):
        listed = document.get(key)
        items += [(item, documents) for item in (listed if isinstance(listed, list) else [])]
    found = []
    for item, is_document in items:
        if not isinstance(item, dict):
            continue
        digest = item.get("digest")
        if isinstance(digest, str) and digest.startswith("sha256:") and is_digest(digest):
            found.append(Named(digest, is_document, str(item.get("mediaType"))))
    return found
