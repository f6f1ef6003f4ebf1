"""Opening snapshots: nothing is returned that was not found sound."""

from __future__ import annotations

import os

import trio

from .metadata import Metadata
from .verify import Snapshot, Verifier, load_metadata, snapshot_directory

__all__ = ["Snapshot", "open_snapshot", "read_metadata", "verify_snapshot"]


async def open_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Find and verify a snapshot, its bases and its layers.

    Memory and layers are read in full only the first time that this host sees them as they
    are. Cancelling ends the work at once.

    :param path: a snapshot's directory, or the ``restore.snap`` in it.
    :raises SnapshotIncompatible: a newer library made it.
    :raises SnapshotInvalid: a file is missing, damaged, or not what was captured; it is named.
    """
    return await trio.to_thread.run_sync(_open, path, False)


async def verify_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """As :func:`open_snapshot`, and everything is read in full, whatever is known of it."""
    return await trio.to_thread.run_sync(_open, path, True)


async def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """What a snapshot says of itself. No other file is looked at; arguments as above."""
    return await trio.to_thread.run_sync(lambda: load_metadata(snapshot_directory(path)))


def _open(path: str | os.PathLike[str], thorough: bool) -> Snapshot:
    verifier = Verifier(trio.from_thread.check_cancelled, thorough=thorough)
    return verifier.snapshot(snapshot_directory(path))
