"""The commands about baked images: ``bake``, ``images``, ``rmi``, ``prune`` and ``snapshot``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import attrs
import click

from ..api import Image, Vm
from ..bake.store import Bake, BakeStore
from ..config.resources import DEFAULT_MEMORY_MIB, DEFAULT_VCPUS
from ..config.vm import EngineName
from ..images.content import ContentStore
from ..images.policy import PullPolicy
from ..library.listing import Pulled, has_moved, list_pulled
from ..library.prune import KEPT_UNUSED, Removed, allocated_file, layers_size, prune, remove
from ..snapshots import Metadata, open_snapshot, read_metadata, verify_snapshot
from . import options
from .failures import printable
from .interrupts import run_until_signal
from .meter import Meter
from .tables import age_text, print_table, size_text

_SHORT: Final = 12  # digits of a fingerprint or digest for people
_STDERR: Final = 2

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("bake", options_metavar="[OPTIONS]")
@click.option("--name", metavar="NAME", help="A name for the bake; it moves to the newest.")
@click.option(
    "--memory",
    type=int,
    default=DEFAULT_MEMORY_MIB,
    show_default=True,
    metavar="MIB",
    help="Guest memory in MiB.",
)
@click.option(
    "--vcpus", type=int, default=DEFAULT_VCPUS, show_default=True, metavar="N", help="Virtual CPUs."
)
@options.environment
@click.option("--cmd", metavar="JSON", help='The command, as a JSON list: ["serve", "-v"].')
@click.option("--entrypoint", metavar="JSON", help="The entrypoint, as a JSON list.")
@options.user
@options.workdir
@click.option(
    "--guest-port",
    type=int,
    metavar="PORT",
    help="A TCP port that the workload serves; the capture waits for a listener.",
)
@click.option(
    "--warmup-exec",
    "warmups",
    multiple=True,
    metavar="COMMAND",
    help="Run this in the guest's shell before the capture; its output goes to stderr.",
)
@click.option(
    "--trigger-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="How long to wait for the workload.  [default: 60]",
)
@options.platform
@options.pull
@options.engine
@click.option("--progress/--no-progress", default=True, help="Show progress on stderr.")
@_as_json
@click.argument("image")
def bake_command(image: str, as_json: bool, progress: bool, **options: Any) -> None:
    """Boot IMAGE once, wait until it is ready, and keep it as a snapshot.

    VMs of the same image, memory, CPUs, environment, command, files and warm-up are restored from
    it from then on. A bake that was done before costs nothing. Without a warm-up the capture
    waits for a listener if the image serves a TCP port, else for up to a second.
    """
    baked = run_until_signal(partial(_bake, image, progress=progress, **options))
    click.echo(json.dumps(_describe(baked), indent=2) if as_json else baked.fingerprint)


async def _bake(
    reference: str,
    *,
    progress: bool,
    name: str | None,
    memory: int,
    vcpus: int,
    environment: tuple[tuple[str, str], ...],
    cmd: str | None,
    entrypoint: str | None,
    user: str | None,
    workdir: str | None,
    guest_port: int | None,
    warmups: tuple[str, ...],
    trigger_timeout: float | None,
    platform: str | None,
    pull: str,
    engine: EngineName,
) -> Bake:
    builder = Image.builder(reference).with_memory_mib(memory).with_vcpus(vcpus)
    builder = builder.with_pull_policy(PullPolicy(pull)).with_engine(engine)
    builder = builder.with_platform(platform)
    for key, value in environment:
        builder = builder.with_env(key, value)
    if name is not None:
        builder = builder.with_name(name)
    if entrypoint is not None:
        builder = builder.with_entrypoint(_words("--entrypoint", entrypoint))
    if cmd is not None:
        builder = builder.with_cmd(_words("--cmd", cmd))
    if user is not None:
        builder = builder.with_user(user)
    if workdir is not None:
        builder = builder.with_workdir(workdir)
    if guest_port is not None:
        builder = builder.with_guest_port(guest_port)
    if trigger_timeout is not None:
        builder = builder.with_trigger_timeout(trigger_timeout)
    if warmups:
        tag = "shell:" + json.dumps(warmups)
        builder = builder.with_warmup(_warmup(warmups)).with_warmup_tag(tag)
    with Meter() as meter:
        image = await builder.build(meter.show if progress else None)
    assert image.snapshot is not None
    place = image.snapshot.directory
    return next(bake for bake in await BakeStore().list() if bake.directory == place)


def _warmup(commands: tuple[str, ...]) -> Callable[[Vm], Awaitable[None]]:
    async def run(vm: Vm) -> None:
        for command in commands:
            await vm.run_process(command, shell=True, stdout=_STDERR, stderr=_STDERR)

    return run


def _words(option: str, text: str) -> list[str]:
    try:
        words = json.loads(text)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise click.BadParameter(
            f'{text!r} is not a JSON list like ["sh", "-c", "true"]', param_hint=option
        )
    return words


@click.command("images")
@_as_json
def images_command(as_json: bool) -> None:
    """List what has been pulled, and what has been baked, the last used first.

    SIZE is what an image has here as it was downloaded, OWN what no other image shares. LAYERS are
    an image's files as they are run, which bakes of the same image share. The total has each
    once, and the files of images that were not baked, too. An image that is marked as moved is
    baked from what its name stood for before.
    """
    pulled, pulled_size = run_until_signal(list_pulled)
    bakes = run_until_signal(BakeStore().list)
    content = ContentStore()
    moved = {bake.fingerprint for bake in bakes if has_moved(bake, content)}
    total = sum(bake.size for bake in bakes) + layers_size() + pulled_size
    if as_json:
        document = {
            "pulled": [attrs.asdict(image) for image in pulled],
            "images": [{**_describe(bake), "moved": bake.fingerprint in moved} for bake in bakes],
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


@click.command("rmi")
@_as_json
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
def rmi_command(images: tuple[str, ...], as_json: bool) -> int:
    """Remove images and bakes: by name, image reference or the beginning of a fingerprint.

    A name that is one of several of its bake goes alone. A reference to a registry stands for
    what was pulled by it, and for all bakes of it. Layers that nothing else needs go too. VMs that
    run go on.
    """
    return _tell(run_until_signal(remove, images), as_json=as_json)


@click.command("prune")
@click.option(
    "-a",
    "--all",
    "everything",
    is_flag=True,
    help="Remove all bakes, named ones too, and all that was pulled.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only tell what would be removed.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@_as_json
def prune_command(everything: bool, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Remove bakes without a name that were not used for a week, layers that no bake needs, and
    what was downloaded for names that stand for another image by now.

    Snapshots that were saved elsewhere are not known here: they need the layers of their image,
    which baking it again brings back.
    """
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


@click.group("snapshot")
def snapshot_group() -> None:
    """Look at snapshots, in directories or as restore.snap files."""


@snapshot_group.command("info")
@_as_json
@click.argument("path", type=click.Path())
def info_command(path: str, as_json: bool) -> None:
    """Tell what a snapshot says of itself."""
    metadata = run_until_signal(read_metadata, path)
    document = _facts(metadata)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        for key, value in document.items():
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            click.echo(f"{key.replace('_', ' '):<14}{printable(text)}")


@snapshot_group.command("verify")
@click.option("--quick", is_flag=True, help="Read only what was not read before on this host.")
@click.argument("path", type=click.Path())
def verify_command(path: str, quick: bool) -> None:
    """Read a snapshot with its bases and layers in full, and tell whether it is sound."""
    snapshot = run_until_signal(open_snapshot if quick else verify_snapshot, path)
    click.echo(f"{snapshot.directory}: sound ({snapshot.identity})")


def _facts(metadata: Metadata) -> dict[str, Any]:
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


def _describe(bake: Bake) -> dict[str, Any]:
    described: dict[str, Any] = {
        "fingerprint": bake.fingerprint,
        "names": list(bake.names),
        "path": str(bake.directory),
        "size": bake.size,
        "layers_size": _layers_size([bake]),
        "used_at": bake.used_at,
    }
    if bake.problem is not None:
        return {**described, "problem": str(bake.problem)}
    assert bake.metadata is not None
    return {**_facts(bake.metadata), **described}


def _layers_size(bakes: list[Bake]) -> int:
    layers = {ref.path for bake in bakes if bake.metadata for ref in bake.metadata.layers}
    return sum(allocated_file(layer) for layer in layers)
