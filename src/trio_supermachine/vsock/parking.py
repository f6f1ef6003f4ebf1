"""The cheapest way for one task to wait for another."""

from __future__ import annotations

from typing import final

import trio


@final
class Parking:
    """A place for one waiting task."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    async def park(self) -> None:
        """Wait for :meth:`wake`. May return without a reason: look again."""
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def wake(self) -> None:
        """Let the task go on, if one waits."""
        task = self._task
        if task is not None:
            self._task = None
            trio.lowlevel.reschedule(task)
