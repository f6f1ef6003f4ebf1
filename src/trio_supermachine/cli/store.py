"""``trio-supermachine pull``, ``inspect``, ``save``, ``load``: images as they are distributed."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import click
import trio

from .._util.progress import Progress, ProgressCallback
from ..errors import ImageCorrupt, ImageNotFound, ReferenceInvalid
from ..images.content import ContentStore
from ..images.policy import PullPolicy
from ..images.prepare import find_local, prepare_image
from ..images.pull import find_pulled, name_of, pulled
from ..library.archives import load, save
from ..oci import MalformedError
from ..oci.platform import Platform
from ..oci.reference import Reference, Transport
from .interrupts import run_until_signal
from .meter import Meter


def pull(
    image: str, platform: str | None, policy: PullPolicy, *, quiet: bool, as_json: bool
) -> None:
    """Pull an image, and print its digest."""
    document = run_until_signal(partial(_pull, image, platform, policy, quiet=quiet))
    click.echo(json.dumps(document, indent=2) if as_json else document["digest"])


async def _pull(
    image: str, platform: str | None, policy: PullPolicy, *, quiet: bool
) -> dict[str, Any]:
    reference = _registry_reference(image)
    wanted = Platform.parse(platform)
    with Meter() as meter:
        progress = _silent if quiet else meter.show
        here = Platform.parse(None)
        if (wanted.os, wanted.architecture) == (here.os, here.architecture):
            await prepare_image(image, pull=policy, platform=platform, progress=progress)
        else:
            await _fetch(reference, wanted, policy, progress)
    return _describe(ContentStore(), reference, wanted)


async def _fetch(
    reference: Reference, platform: Platform, policy: PullPolicy, progress: ProgressCallback
) -> None:
    try:
        async with pulled(reference, platform, policy, progress=progress, to_run=False):
            pass
    except MalformedError as error:
        raise ImageCorrupt(str(reference), str(error)) from error


async def _silent(step: Progress) -> None:
    await trio.lowlevel.checkpoint()


def _registry_reference(text: str) -> Reference:
    reference = Reference.parse(text)
    if reference.transport is not Transport.DOCKER:
        raise ReferenceInvalid(text, "it is on this host already; only registries are pulled from")
    return reference


def inspect(image: str, platform: str | None) -> None:
    """Print what an image is."""
    reference, wanted = Reference.parse(image), Platform.parse(platform)
    try:
        if reference.transport is Transport.DOCKER:
            document = _describe(ContentStore(), reference, wanted)
        else:
            document = _describe_local(reference, wanted)
    except MalformedError as error:
        raise ImageCorrupt(image, str(error)) from error
    click.echo(json.dumps(document, indent=2))


def _describe(store: ContentStore, reference: Reference, platform: Platform) -> dict[str, Any]:
    choice = find_pulled(store, reference, platform)
    if choice is None:
        raise ImageNotFound(
            str(reference),
            f"it was not pulled; trio-supermachine pull {name_of(reference)} gets it",
        )
    record = store.record(name_of(reference))
    found = choice.configuration
    return {
        "name": name_of(reference),
        "digest": choice.manifest.digest,
        "index": record.top.digest if record and record.top != choice.manifest else None,
        "resolved_at": record.resolved_at if record else None,
        "platform": None if found.platform is None else str(found.platform),
        "config": attrs.asdict(found.config),
        "layers": [
            {
                "digest": layer.digest,
                "diff_id": diff_id,
                "media_type": layer.media_type,
                "size": layer.size,
                "here": store.has(layer),
            }
            for layer, diff_id in choice.layers
        ],
        "size": choice.size,
    }


def _describe_local(reference: Reference, platform: Platform) -> dict[str, Any]:
    if reference.transport in (Transport.ROOTFS, Transport.BUILTIN):
        raise ReferenceInvalid(str(reference), "it is no OCI image, and has no documents")
    image = find_local(reference, platform)
    return {
        "name": str(reference),
        "digest": image.digest,
        "config": attrs.asdict(image.config),
        "layers": [
            {"digest": layer.digest, "diff_id": layer.diff_id, "size": layer.blob.size}
            for layer in image.layers
        ],
        "size": sum(layer.blob.size for layer in image.layers),
    }


def save_images(file: str, images: tuple[str, ...], *, as_json: bool) -> None:
    """Write an archive of images; ``"-"`` is stdout."""
    if file == "-":
        if sys.stdout.isatty():
            raise click.UsageError("an archive is not written to a terminal; give a file")
        run_until_signal(save, sys.stdout.buffer, images)
        sys.stdout.buffer.flush()
        return
    path = Path(file).resolve()
    if not path.parent.is_dir():
        raise click.UsageError(f"there is no directory {path.parent}")
    if path.exists() and not path.is_file():  # a pipe or a device, which a file must not replace
        with path.open("wb") as stream:
            records = run_until_signal(save, stream, images)
    else:
        records = run_until_signal(save, path, images)
    if as_json:
        described = {record.name: record.top.digest for record in records}
        click.echo(json.dumps({"file": file, "images": described}, indent=2))


def load_images(file: str, name: str | None, *, quiet: bool, as_json: bool) -> None:
    """Take the images of an archive into the store, and print their names."""
    names = run_until_signal(_load, Path(file), name, quiet)
    if as_json:
        store = ContentStore()
        found = {each: record.top.digest for each in names if (record := store.record(each))}
        click.echo(json.dumps({"images": found}, indent=2))
    else:
        for each in names:
            click.echo(each)


async def _load(path: Path, name: str | None, quiet: bool) -> tuple[str, ...]:
    with Meter() as meter:
        return await load(path, name=name, progress=None if quiet else meter.show)
