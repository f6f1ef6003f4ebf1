"""Snapshots as files: their format, their verification, and their writing."""

from __future__ import annotations

from .directory import open_snapshot, read_metadata, verify_snapshot
from .memory import MemoryImage, PagePatch
from .metadata import Draft, LayerRef, Metadata
from .verify import Snapshot
from .writing import finish_diff, finish_full, layer_refs, new_snapshot

__all__ = [
    "Draft",
    "LayerRef",
    "MemoryImage",
    "Metadata",
    "PagePatch",
    "Snapshot",
    "finish_diff",
    "finish_full",
    "layer_refs",
    "new_snapshot",
    "open_snapshot",
    "read_metadata",
    "verify_snapshot",
]
