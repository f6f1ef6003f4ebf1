"""``trio-supermachine images``, ``rmi`` and ``prune``: what is on the disk."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Any, Final

import attrs
import click

from ..bake.store import Bake, BakeStore
from ..images.content import ContentStore
from ..library.listing import Pulled, has_moved, list_pulled
from ..library.prune import KEPT_UNUSED, Removed, allocated_file, layers_size, prune, remove
from .exits import printable
from .interrupts import run_until_signal
from .snapshot import facts
from .tables import age_text, print_table, size_text

_SHORT: Final = 12  # digits of a fingerprint or digest for people


def list_images(*, as_json: bool) -> None:
    """Print what was pulled, and what was baked."""
    pulled, pulled_size = run_until_signal(list_pulled)
    bakes = run_until_signal(BakeStore().list)
    content = ContentStore()
    moved = {bake.fingerprint for bake in bakes if has_moved(bake, content)}
    total = sum(bake.size for bake in bakes) + layers_size() + pulled_size
    if as_json:
        document = {
            "pulled": [attrs.asdict(image) for image in pulled],
            "images": [{**describe(bake), "moved": bake.fingerprint in moved} for bake in bakes],
            "size": total,
        }
        click.echo(json.dumps(document, indent=2))
        return
    if pulled:
        print_table([("PULLED", "DIGEST", "SIZE", "OWN", "ASKED"), *map(_pulled_row, pulled)])
        click.echo()
    head = ("NAME", "IMAGE", "FINGERPRINT", "ENGINE", "MEMORY", "SNAPSHOT", "LAYERS", "USED")
    print_table([head, *(_row(bake, moved=bake.fingerprint in moved) for bake in bakes)])
    click.echo(f"total {size_text(total)}")


def _pulled_row(image: Pulled) -> tuple[str, ...]:
    return (
        image.name,
        image.digest.partition(":")[2][:_SHORT],
        size_text(image.size),
        size_text(image.own_size),
        age_text(time.time() - image.resolved_at),
    )


def _row(bake: Bake, *, moved: bool) -> tuple[str, ...]:
    metadata = bake.metadata
    names = ",".join(bake.names) or "-"
    short, used = bake.fingerprint[:_SHORT], age_text(time.time() - bake.used_at)
    if metadata is None:
        return (names, "damaged", short, "-", "-", size_text(bake.size), "-", used)
    return (
        names,
        printable(metadata.image_reference) + (" (moved)" if moved else ""),
        short,
        printable(metadata.engine),
        f"{metadata.memory_mib} MiB",
        size_text(bake.size),
        size_text(_layers_size([bake])),
        used,
    )


def remove_images(images: tuple[str, ...], *, as_json: bool) -> int:
    """Remove images and bakes, and print what went; give the program's exit code."""
    return _tell(run_until_signal(remove, images), as_json=as_json)


def prune_images(*, everything: bool, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Remove what nothing needs, and print what went; give the program's exit code."""
    if not dry_run and not yes:
        which = (
            "all bakes, all pulled images"
            if everything
            else f"unnamed bakes older than {age_text(KEPT_UNUSED)}"
        )
        if not sys.stdin.isatty():
            raise click.UsageError("there is no terminal to ask on; give --yes or --dry-run")
        if not click.confirm(f"Remove {which}, and layers that no bake needs?", err=True):
            return 1
    removed = run_until_signal(partial(prune, everything=everything, dry_run=dry_run))
    return _tell(removed, as_json=as_json, dry_run=dry_run)


def _tell(removed: Removed, *, as_json: bool, dry_run: bool = False) -> int:
    if as_json:
        document = {
            "bakes": [bake.fingerprint for bake in removed.bakes],
            "layers": [str(layer) for layer in removed.layers],
            "busy": [bake.fingerprint for bake in removed.busy],
            "pulled": list(removed.names),
            "blobs": list(removed.blobs),
            "size": removed.size,
            "dry_run": dry_run,
        }
        click.echo(json.dumps(document, indent=2))
    else:
        verb = "would remove" if dry_run else "removed"
        for bake in removed.bakes:
            what = printable(bake.metadata.image_reference) if bake.metadata else "damaged"
            click.echo(f"{verb} {bake.fingerprint[:_SHORT]}  {what}")
        for name in removed.names:
            click.echo(f"{verb} {name}")
        for layer in removed.layers:
            click.echo(f"{verb} layer {layer.name}")
        for bake in removed.busy:
            click.echo(f"left {bake.fingerprint[:_SHORT]}: it is being made just now", err=True)
        if removed.blobs:
            click.echo(f"{verb} {len(removed.blobs)} downloaded blobs")
        click.echo(f"{verb} {size_text(removed.size)}")
    return 1 if removed.busy else 0


def describe(bake: Bake) -> dict[str, Any]:
    """Describe a bake, for JSON."""
    described: dict[str, Any] = {
        "fingerprint": bake.fingerprint,
        "names": list(bake.names),
        "path": str(bake.directory),
        "moments": [moment.value for moment in bake.moments],
        "size": bake.size,
        "layers_size": _layers_size([bake]),
        "used_at": bake.used_at,
    }
    if bake.problem is not None:
        return {**described, "problem": str(bake.problem)}
    assert bake.metadata is not None
    return {**facts(bake.metadata), **described}


def _layers_size(bakes: list[Bake]) -> int:
    layers = {ref.path for bake in bakes if bake.metadata for ref in bake.metadata.layers}
    return sum(allocated_file(layer) for layer in layers)
