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


def build(jobs: int | None, *, as_json: bool) -> None:
    """Build the small kernel, and print it."""
    with Meter() as meter:
        kernel = run_until_signal(partial(build_small_kernel, jobs=jobs, progress=meter.show))
    _print_one(kernel, as_json=as_json)


def fetch(*, as_json: bool) -> None:
    """Fetch the stock kernel, and print it."""
    with Meter() as meter:
        kernel = run_until_signal(partial(fetch_stock_kernel, progress=meter.show))
    _print_one(kernel, as_json=as_json)


def list_all(*, as_json: bool) -> None:
    """Print the kernels that are here."""
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
