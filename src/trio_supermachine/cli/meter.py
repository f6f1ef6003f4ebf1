"""Progress on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import click

from .._util.progress import Progress
from .exits import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

#: Phases of layers, of which there are many, and which are told on terminals only.
_TERMINAL_ONLY: Final = ("download", "load", "convert", "verify")
_WIDTH: Final = 24  # of what an item is called; of a digest that is enough


class Meter:
    """Progress on stderr: bars on a terminal, else a line for each phase that is one step."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._phase = ""
        self._bars: Bars | None = None
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    async def show(self, step: Progress) -> None:
        if self._live:
            self._draw(step)
        elif step.phase not in _TERMINAL_ONLY:
            if step.phase != self._phase:
                click.echo(f"{step.phase}: {printable(step.item)}", err=True)
            self._phase = step.phase

    def _draw(self, step: Progress) -> None:
        bars = self._bars = self._bars or _start_bars()
        key = (step.phase, step.item)
        if key not in self._tasks:
            # What has no end is over when something else begins.
            for other in [o for o, task in self._tasks.items() if bars.tasks[task].total is None]:
                bars.update(self._tasks[other], visible=False)
            text = printable(step.item).removeprefix("sha256:")[:_WIDTH]
            self._tasks[key] = bars.add_task(f"{step.phase} {text}", total=step.total)
        over = step.total is not None and step.done >= step.total
        bars.update(self._tasks[key], completed=step.done, visible=not over)
        bars.refresh()


def _start_bars() -> Bars:
    # Loading this takes longer than most commands that show no progress.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )
    bars.start()
    return bars
