"""List of images that were pulled or loaded, with the room that each takes on the disk."""

from __future__ import annotations

from collections import Counter

import attrs
import trio

from ..bake.store import Bake
from ..errors import ImageNotFound, NotSupported, ReferenceInvalid
from ..images.content import ContentStore
from ..images.pull import find_pulled
from ..oci import MalformedError
from ..oci.platform import Platform
from ..oci.reference import Reference, Transport


@attrs.frozen(kw_only=True)
class Pulled:
    """An image in the content store.

    :ivar name: the image's full name.
    :ivar digest: the digest of the index or manifest that the name stands for.
    :ivar size: the bytes of all its blobs that are here.
    :ivar own_size: the bytes of those blobs that no other image here has.
    :ivar resolved_at: the time when a registry was last asked, or the image was loaded; in seconds
        since 1970.
    """

    name: str
    digest: str
    size: int
    own_size: int
    resolved_at: float


async def list_pulled(store: ContentStore | None = None) -> tuple[tuple[Pulled, ...], int]:
    """List all images in the content store, and add up their blobs' sizes, each blob once."""
    return await trio.to_thread.run_sync(_list, store or ContentStore())


def _list(store: ContentStore) -> tuple[tuple[Pulled, ...], int]:
    records = store.records()
    below = [store.below(record.top) for record in records]
    users = Counter(digest for blobs in below for digest in blobs)
    pulled = tuple(
        Pulled(
            name=record.name,
            digest=record.top.digest,
            size=sum(blobs.values()),
            own_size=sum(size for digest, size in blobs.items() if users[digest] == 1),
            resolved_at=record.resolved_at,
        )
        for record, blobs in zip(records, below, strict=True)
    )
    return pulled, sum({digest: s for blobs in below for digest, s in blobs.items()}.values())


def has_moved(bake: Bake, store: ContentStore) -> bool:
    """Give whether the name of a bake's image stands for another image by now.

    The content store knows; no registry is asked.
    """
    if bake.metadata is None:
        return False
    try:
        reference = Reference.parse(bake.metadata.image_reference)
        if reference.transport is not Transport.DOCKER or reference.digest is not None:
            return False
        choice = find_pulled(store, reference, Platform.parse(None))
    except (ReferenceInvalid, ImageNotFound, NotSupported, MalformedError):
        return False
    return choice is not None and choice.manifest.digest != bake.metadata.image_digest
