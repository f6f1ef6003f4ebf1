"""The grammar of ``doctor``."""

from __future__ import annotations

import click

from . import options


@click.command("doctor")
@options.as_json
def doctor_command(as_json: bool) -> int:
    """Tell whether this host can start VMs, and what to install if it cannot."""
    from ..doctor import tell

    return tell(as_json=as_json)
