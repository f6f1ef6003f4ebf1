"""``trio-supermachine kernel``: the kernels that guests boot."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click

from ..kernels import (
    CachedKernel,
    build_small_kernel,
    fetch_stock_kernel,
    list_kernels,
    preferred_kernel,
)
from .interrupts import run_until_signal
from .meter import Meter


@click.group("kernel")
def kernel_group() -> None:
    """Build, fetch and list the kernels that guests boot.

    A start takes the kernel that TRIO_SUPERMACHINE_KERNEL names, else the small kernel of this
    version, else Debian's cloud kernel, which the first start fetches.
    """


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@kernel_group.command("build")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Compilers at once.  [default: one for each processor]",
)
@_as_json
def build_command(jobs: int | None, as_json: bool) -> None:
    """Build the small kernel from Debian's linux-source package, unless it is here.

    It boots in about a third of the stock kernel's time and takes less than half of its memory. The
    build takes some minutes and 1 GB of disk meanwhile; Ctrl-C ends it and leaves nothing
    behind. It needs gcc, make, flex, bison, bc, xz-utils and libelf-dev, and never installs them.
    """
    with Meter() as meter:
        kernel = run_until_signal(partial(build_small_kernel, jobs=jobs, progress=meter.show))
    _print_one(kernel, as_json=as_json)


@kernel_group.command("fetch")
@_as_json
def fetch_command(as_json: bool) -> None:
    """Fetch Debian's cloud kernel, unless one is here, as the first start would."""
    with Meter() as meter:
        kernel = run_until_signal(partial(fetch_stock_kernel, progress=meter.show))
    _print_one(kernel, as_json=as_json)


@kernel_group.command("list")
@_as_json
def list_command(as_json: bool) -> None:
    """List the prepared kernels; the one that a start takes is marked with a star."""
    kernels = run_until_signal(list_kernels)
    if not kernels and not as_json:
        click.echo("no kernel yet: the first start fetches one", err=True)
    preferred = run_until_signal(preferred_kernel)
    if as_json:
        click.echo(json.dumps([_describe(kernel, preferred) for kernel in kernels], indent=2))
    else:
        for kernel in kernels:
            click.echo(_line(kernel, preferred))


def _print_one(kernel: CachedKernel, *, as_json: bool) -> None:
    preferred = run_until_signal(preferred_kernel)
    if as_json:
        click.echo(json.dumps(_describe(kernel, preferred), indent=2))
    else:
        click.echo(_line(kernel, preferred))


def _line(kernel: CachedKernel, preferred: CachedKernel | None) -> str:
    star = "*" if kernel == preferred else " "
    megabytes = f"{kernel.kernel.stat().st_size / 1e6:.0f} MB"
    return f"{star} {kernel.kind:<6}{kernel.release:<30}{megabytes:>7}  {kernel.origin}"


def _describe(kernel: CachedKernel, preferred: CachedKernel | None) -> dict[str, Any]:
    return {
        "kind": kernel.kind,
        "release": kernel.release,
        "origin": kernel.origin,
        "path": str(kernel.kernel),
        "digest": kernel.digest,
        "size": kernel.kernel.stat().st_size,
        "modules": list(kernel.modules),
        "preferred": kernel == preferred,
    }
