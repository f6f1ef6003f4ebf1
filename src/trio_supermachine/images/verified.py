"""Which blobs have been hashed, so that an unchanged file is not hashed again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import trio

from .. import hostfiles
from ..oci.decompress import Blob, open_layer
from ..oci.malformed import MalformedError
from ..oci.manifest import LayerSource

#: A file changed this recently (in nanoseconds) could change again with the same time stamps.
_RACY = 100_000_000


class VerifiedBlobs:
    """What is known of blobs, each by its place and its file's identity."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def identity(self, blob: Blob) -> tuple[int, ...]:
        """What changes whenever the file does."""
        status = os.stat(blob.path)
        return (
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )

    def known(self, source: LayerSource) -> bool:
        """Whether this blob was found to have these digests, and has not changed since."""
        try:
            found = json.loads(self._record(source.blob).read_bytes())
        except (OSError, ValueError):
            return False
        return bool(found == self._claim(source, self.identity(source.blob)))

    def remember(self, source: LayerSource, before: tuple[int, ...]) -> None:
        """Note that the blob has its digests; ``before`` is its identity before it was read."""
        if self.identity(source.blob) != before:
            raise MalformedError(f"{source.blob.path} changed while it was read")
        if time.time_ns() - max(before[3:]) > _RACY:
            with hostfiles.new_file(self._record(source.blob)) as new:
                new.write_text(json.dumps(self._claim(source, before)))

    def verify(self, source: LayerSource, limit: int) -> None:
        """Hash a blob, stored and unpacked; in a worker thread of Trio's.

        :raises MalformedError: its digests are not those it should have.
        """
        before = self.identity(source.blob)
        with open_layer(source.blob, limit, trio.from_thread.check_cancelled) as (stored, layer):
            diff_id = layer.digest()
            source.check(stored.digest(), diff_id)
        self.remember(source, before)

    def _record(self, blob: Blob) -> Path:
        place = f"{blob.path.absolute()}\0{blob.offset}\0{blob.size}"
        return self._directory / hashlib.sha256(os.fsencode(place)).hexdigest()

    @staticmethod
    def _claim(source: LayerSource, identity: tuple[int, ...]) -> list[object]:
        return [*identity, source.digest, source.diff_id]
