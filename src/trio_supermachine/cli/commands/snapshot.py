"""The grammar of ``snapshot``."""

from __future__ import annotations

import click

from . import options


@click.group("snapshot")
def snapshot_group() -> None:
    """Look at snapshots, in directories or as restore.snap files."""


@snapshot_group.command("info")
@options.as_json
@click.argument("path", type=click.Path())
def info_command(path: str, as_json: bool) -> None:
    """Tell what a snapshot says of itself."""
    from ..snapshot import info

    info(path, as_json=as_json)


@snapshot_group.command("verify")
@click.option("--quick", is_flag=True, help="Read only what was not read before on this host.")
@click.argument("path", type=click.Path())
def verify_command(path: str, quick: bool) -> None:
    """Read a snapshot with its bases and layers in full, and tell whether it is sound."""
    from ..snapshot import verify

    verify(path, quick=quick)
