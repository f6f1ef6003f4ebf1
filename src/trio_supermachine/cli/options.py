"""What options of several commands have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click


def variables(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """``NAME=VALUE`` options; a ``NAME`` alone stands for this program's own variable."""
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
