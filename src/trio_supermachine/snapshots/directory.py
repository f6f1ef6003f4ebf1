"""Opening snapshots, each of which is verified first."""

from __future__ import annotations

import os

import trio

from .metadata import Metadata
from .verify import Snapshot, Verifier, load_metadata, snapshot_directory

__all__ = ["Snapshot", "open_snapshot", "read_metadata", "verify_snapshot"]


async def open_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Find and verify a snapshot, its bases and its layers.

    Memory and layers are read in full the first time that this host sees them. Cancelling ends
    the work at once.

    :param path: a snapshot's directory, or the ``restore.snap`` in it.
    :raises SnapshotIncompatible: a newer library made it.
    :raises SnapshotInvalid: a file is missing, damaged, or not what was captured; it is named.
    """
    return await trio.to_thread.run_sync(_open, path, False)


async def verify_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Verify a snapshot as :func:`open_snapshot`, but read everything in full."""
    return await trio.to_thread.run_sync(_open, path, True)


async def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Read a snapshot's metadata and no other file.

    :param path: as of :func:`open_snapshot`.
    """
    return await trio.to_thread.run_sync(lambda: load_metadata(snapshot_directory(path)))


def _open(path: str | os.PathLike[str], thorough: bool) -> Snapshot:
    verifier = Verifier(trio.from_thread.check_cancelled, thorough=thorough)
    return verifier.snapshot(snapshot_directory(path))
