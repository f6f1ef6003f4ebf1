"""The grammar of ``images``, ``rmi`` and ``prune``."""

from __future__ import annotations

import click

from . import options


@click.command("images")
@options.as_json
def images_command(as_json: bool) -> None:
    """List what has been pulled, and what has been baked, the last used first.

    SIZE is what an image has here as it was downloaded, OWN what no other image shares. LAYERS are
    an image's files as they are run, which bakes of the same image share. The total has each
    once, and the files of images that were not baked, too. An image that is marked as moved is
    baked from what its name stood for before.
    """
    from ..images import list_images

    list_images(as_json=as_json)


@click.command("rmi")
@options.as_json
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
def rmi_command(images: tuple[str, ...], as_json: bool) -> int:
    """Remove images and bakes: by name, image reference or the beginning of a fingerprint.

    A name that is one of several of its bake goes alone. A reference to a registry stands for
    what was pulled by it, and for all bakes of it. Layers that nothing else needs go too. VMs that
    run go on.
    """
    from ..images import remove_images

    return remove_images(images, as_json=as_json)


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
@options.as_json
def prune_command(everything: bool, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Remove bakes without a name that were not used for a week, layers that no bake needs, and
    what was downloaded for names that stand for another image by now.

    Snapshots that were saved elsewhere are not known here: they need the layers of their image,
    which baking it again brings back.
    """
    from ..images import prune_images

    return prune_images(everything=everything, dry_run=dry_run, yes=yes, as_json=as_json)
