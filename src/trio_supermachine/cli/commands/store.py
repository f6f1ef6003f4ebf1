"""The grammar of ``pull``, ``inspect``, ``save`` and ``load``."""

from __future__ import annotations

import click

from ...images.policy import PullPolicy
from . import options


@click.command("pull")
@options.platform
@click.option(
    "--policy",
    "pull",
    type=click.Choice([policy.value for policy in PullPolicy]),
    default=PullPolicy.ALWAYS.value,
    show_default=True,
    help="When to ask the registry.",
)
@options.quiet
@options.as_json
@click.argument("image")
def pull_command(image: str, platform: str | None, pull: str, quiet: bool, as_json: bool) -> None:
    """Get IMAGE from its registry and make it ready to run, and print its digest.

    IMAGE is a name as for Docker: [HOST[:PORT]/]NAME[:TAG][@DIGEST]. What is here already is
    not downloaded again, and what was broken off goes on where it was. An image for a platform
    that no guest here can have is kept as it is.
    """
    from ..store import pull as pull_image

    pull_image(image, platform, PullPolicy(pull), quiet=quiet, as_json=as_json)


@click.command("inspect")
@options.platform
@click.argument("image")
def inspect_command(image: str, platform: str | None) -> None:
    """Print what IMAGE is, as JSON: its digest, its configuration and its layers.

    It is one that was pulled or loaded, or in a layout or archive. No registry is asked.
    """
    from ..store import inspect

    inspect(image, platform)


@click.command("save")
@options.as_json
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
def save_command(file: str, images: tuple[str, ...], as_json: bool) -> None:
    """Write an OCI archive of images that were pulled or loaded, with the same digests.

    FILE can be run (oci-archive:FILE:NAME) or loaded on another host. "-" is stdout.
    """
    from ..store import save_images

    save_images(file, images, as_json=as_json)


@click.command("load")
@click.option("--name", metavar="NAME", help="The name of the archive's only image.")
@options.quiet
@options.as_json
@click.argument("file", type=click.Path())
def load_command(file: str, name: str | None, quiet: bool, as_json: bool) -> None:
    """Take the images of an OCI or docker archive into the store, and print their names."""
    from ..store import load_images

    load_images(file, name, quiet=quiet, as_json=as_json)
