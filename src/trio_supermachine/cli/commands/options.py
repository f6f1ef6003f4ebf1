"""Options that several commands have."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, get_args

import click

from ...config.defaults import EngineName
from ...images.policy import PullPolicy

Command = TypeVar("Command", bound=Callable[..., Any] | click.Command)


class Option(Protocol):
    """The decorator that gives a command an option."""

    def __call__(self, command: Command, /) -> Command: ...


def variables(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Read ``NAME=VALUE`` options; a ``NAME`` alone stands for this program's own variable."""
    found = []
    for text in values:
        key, equals, value = text.partition("=")
        if not key:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", context, parameter)
        if equals:
            found.append((key, value))
        elif key in os.environ:
            found.append((key, os.environ[key]))
    return tuple(found)


environment: Option = click.option(
    "-e",
    "--env",
    "environment",
    multiple=True,
    callback=variables,
    metavar="NAME[=VALUE]",
    help="Add a variable to the image's environment; without a value, this program's own.",
)
user: Option = click.option(
    "-u", "--user", metavar="USER", help="User name or id, with an optional :GROUP."
)
workdir: Option = click.option(
    "-w", "--workdir", metavar="DIR", help="Working directory in the guest."
)
engine: Option = click.option(
    "--engine",
    type=click.Choice(get_args(EngineName)),
    default="auto",
    show_default=True,
    help="What runs the VM.",
)
platform: Option = click.option(
    "--platform", metavar="OS/ARCH", help="Which variant of the image to take."
)
pull: Option = click.option(
    "--pull",
    type=click.Choice([policy.value for policy in PullPolicy]),
    default="missing",
    show_default=True,
    help="When to ask a registry.",
)
as_json: Option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
quiet: Option = click.option("-q", "--quiet", is_flag=True, help="Show no progress on stderr.")
