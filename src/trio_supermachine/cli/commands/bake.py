"""The grammar of ``bake``."""

from __future__ import annotations

from typing import Any

import click

from ...config.defaults import DEFAULT_MEMORY_MIB, DEFAULT_VCPUS
from . import options


@click.command("bake", options_metavar="[OPTIONS]")
@click.option(
    "--name",
    metavar="NAME",
    help="A name for rmi, which keeps the bake from prune; it moves to the newest.",
)
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
@options.as_json
@click.argument("image")
def bake_command(image: str, as_json: bool, **given: Any) -> None:
    """Boot IMAGE once, wait until it is ready, and keep it as a snapshot.

    VMs of the same image, memory, CPUs, environment, command, files and warm-up are restored from
    it from then on. A name is no image reference: a program gets this bake by the same settings.
    A bake that was done before costs nothing. Without a warm-up the capture
    waits for a listener if the image serves a TCP port, else for up to a second.
    """
    from ..bake import bake

    bake(image, as_json=as_json, **given)
