"""Warm VMs: those in which a program has run already.

The first program after a boot or a restore is slow: pages come from the disk, and an emulating
engine translates code. A *trial* is a program that is run for that alone. Before a capture it
brings into memory what each copy needs; in a copy it has the engine translate what will run again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from ..agent.wire import ExecFlags, ExecRequest
from ..errors import RestoreTimeout, StartTimeout
from ..programs.request import exec_request
from .plan import Plan
from .running import RunningVm, open_vm

#: The guest's init, the one program that every image has.
_OTHER_TRIAL: Final = ["/proc/1/exe", "--trial"]
_QUIET: Final = ExecFlags.STDIN | ExecFlags.NULL_STDOUT | ExecFlags.NULL_STDERR


async def run_trial(running: RunningVm) -> None:
    """Run a program in the guest, so that the next one is quick.

    The image's own ``true`` comes nearest to a real program: it needs the image's files, user and
    loader. An image without one gets the guest's init.
    """
    try:
        await _run_to_end(running, exec_request([["true"]], _QUIET, empty_stdin=True))
    except OSError:
        other = exec_request([_OTHER_TRIAL], _QUIET, env={}, cwd="/", user=0, empty_stdin=True)
        await _run_to_end(running, other)


async def _run_to_end(running: RunningVm, request: ExecRequest) -> None:
    async with running.open_exec(request) as child:
        await child.wait()


@asynccontextmanager
async def open_warm_vm(plan: Plan) -> AsyncIterator[RunningVm]:
    """Carry out a plan as :func:`~.running.open_vm` does, and run a trial before the body.

    :raises StartTimeout: or :exc:`RestoreTimeout`; also for a trial that does not end in time.
    """
    async with open_vm(plan) as running:
        restored = plan.started_by == "restore"
        seconds = plan.config.restore_timeout if restored else plan.config.start_timeout
        with trio.move_on_after(seconds) as scope:
            await run_trial(running)
        if scope.cancelled_caught:
            console = running.console.text_tail()
            raise (RestoreTimeout if restored else StartTimeout)(seconds, console=console)
        yield running
