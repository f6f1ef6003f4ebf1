"""Progress on the terminal."""

from __future__ import annotations

import sys
from typing import Final

import click

from ..oci.progress import Progress

_WIDTH: Final = 78


class Meter:
    """Progress on stderr: one line that changes on a terminal, else a line for each phase."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._phase = ""
        self._open = False

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._open:
            click.echo(err=True)

    async def show(self, step: Progress) -> None:
        if not self._live:
            if step.phase != self._phase:
                click.echo(f"{step.phase}: {step.item}", err=True)
        else:
            share = f"{100 * step.done // step.total:3}% " if step.total else ""
            text = f"{step.phase}: {share}{step.item}"
            click.echo(f"\r{text[:_WIDTH]:<{_WIDTH}}", nl=False, err=True)
            self._open = True
        self._phase = step.phase
