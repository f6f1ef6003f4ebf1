"""A place for one task to wait, at the least cost.

Theory of operation. :meth:`Parking.park` and :meth:`Parking.wake` have no memory: a wake without a
waiting task is lost, and a park may return for no reason. So a task looks at the state that it
waits for, parks if it is not there, with no checkpoint in between, and looks again.
"""

from __future__ import annotations

from typing import final

import trio


@final
class Parking:
    """Place for one waiting task."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    async def park(self) -> None:
        """Wait for :meth:`wake`, or for no reason: look again. A checkpoint."""
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
