"""``trio-supermachine snapshot``: look at snapshots."""

from __future__ import annotations

import json
from typing import Any

import click

from ..snapshots import Metadata, open_snapshot, read_metadata, verify_snapshot
from .exits import printable
from .interrupts import run_until_signal


def info(path: str, *, as_json: bool) -> None:
    """Print what a snapshot says of itself."""
    metadata = run_until_signal(read_metadata, path)
    document = facts(metadata)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        for key, value in document.items():
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            click.echo(f"{key.replace('_', ' '):<14}{printable(text)}")


def verify(path: str, *, quick: bool) -> None:
    """Read a snapshot in full, and print that it is sound."""
    snapshot = run_until_signal(open_snapshot if quick else verify_snapshot, path)
    click.echo(f"{snapshot.directory}: sound ({snapshot.identity})")


def facts(metadata: Metadata) -> dict[str, Any]:
    """Describe a snapshot, for JSON."""
    return {
        "identity": metadata.identity,
        "kind": metadata.kind,
        "base": None if metadata.base is None else str(metadata.base.path),
        "reference": metadata.image_reference,
        "digest": metadata.image_digest,
        "fingerprint": metadata.fingerprint,
        "engine": metadata.engine,
        "host": dict(metadata.host),
        "memory_mib": metadata.memory_mib,
        "vcpus": metadata.vcpus,
        "guest_port": metadata.guest_port,
        "kernel": metadata.kernel_release,
        "layers": [str(layer.path) for layer in metadata.layers],
        "memory_bytes": metadata.memory.data,
        "created_by": metadata.created_by,
        "created_at": metadata.created_at,
    }
