"""The grammar of ``kernel``."""

from __future__ import annotations

import click

from . import options


@click.group("kernel")
def kernel_group() -> None:
    """Build, fetch and list the kernels that guests boot.

    A start takes the kernel that TRIO_SUPERMACHINE_KERNEL names, else the small kernel of this
    version, else Debian's cloud kernel, which the first start fetches.
    """


@kernel_group.command("build")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Compilers at once.  [default: one for each processor]",
)
@options.as_json
def build_command(jobs: int | None, as_json: bool) -> None:
    """Build the small kernel from Debian's linux-source package, unless it is here.

    It boots in about a third of the stock kernel's time and takes less than half of its memory. The
    build takes some minutes and 1 GB of disk meanwhile; Ctrl-C ends it and leaves nothing
    behind. It needs gcc, make, flex, bison, bc, xz-utils and libelf-dev, and never installs them.
    """
    from ..kernel import build

    build(jobs, as_json=as_json)


@kernel_group.command("fetch")
@options.as_json
def fetch_command(as_json: bool) -> None:
    """Fetch Debian's cloud kernel, unless one is here, as the first start would."""
    from ..kernel import fetch

    fetch(as_json=as_json)


@kernel_group.command("list")
@options.as_json
def list_command(as_json: bool) -> None:
    """List the prepared kernels; the one that a start takes is marked with a star."""
    from ..kernel import list_all

    list_all(as_json=as_json)
