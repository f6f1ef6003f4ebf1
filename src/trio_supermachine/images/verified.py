"""Records of blobs that have been hashed, so that an unchanged file is not hashed again."""

from __future__ import annotations

import os
from pathlib import Path

import trio

from ..host.verified import Identity, VerifiedFiles, identity
from ..oci import MalformedError
from ..oci.decompress import Blob, open_layer
from ..oci.manifest import LayerSource


class VerifiedBlobs:
    """Records of blobs, each by its place and its file's identity."""

    def __init__(self, directory: Path) -> None:
        self._files = VerifiedFiles(directory)

    def identity(self, blob: Blob) -> Identity:
        """Give the values that change whenever the blob's file does."""
        return identity(os.stat(blob.path))

    def known(self, source: LayerSource) -> bool:
        """Give whether this blob was found to have these digests and has not changed since."""
        found = self._files.recall(_place(source.blob), self.identity(source.blob))
        return found == _facts(source)

    def remember(self, source: LayerSource, before: Identity) -> None:
        """Note that the blob has its digests.

        :param before: its file's identity before it was read.
        :raises MalformedError: the file has changed since.
        """
        if self.identity(source.blob) != before:
            raise MalformedError(f"{source.blob.path} changed while it was read")
        self._files.remember(_place(source.blob), before, *_facts(source))

    def verify(self, source: LayerSource, limit: int) -> None:
        """Hash a blob, as stored and unpacked, in a worker thread of Trio's.

        :raises MalformedError: a digest differs, or the layer has more than ``limit`` bytes.
        """
        before = self.identity(source.blob)
        with open_layer(source.blob, limit, trio.from_thread.check_cancelled) as (stored, layer):
            diff_id = layer.digest()
            source.check(stored.digest(), diff_id)
        self.remember(source, before)


def _place(blob: Blob) -> str:
    return f"{blob.path.absolute()}\0{blob.offset}\0{blob.size}"


def _facts(source: LayerSource) -> list[str]:
    return [source.digest or "", source.diff_id]
