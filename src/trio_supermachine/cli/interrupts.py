"""Ctrl-C, and other signals that ask the program to end."""

from __future__ import annotations

import gc
import signal
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from .._util.nursery import open_flat_nursery
from .exits import SIGNALLED, EarlyExit

_Result = TypeVar("_Result")

#: Those that a program may be started to ignore, in the background or by nohup(1).
_IGNORABLE: Final = (signal.SIGINT, signal.SIGHUP)


def run_until_signal(function: Callable[..., Awaitable[_Result]], *arguments: object) -> _Result:
    """Call :func:`trio.run`, cancelled by the first signal that asks this program to end.

    A ``KeyboardInterrupt`` would come in the middle of anything, and in exception groups.

    :raises EarlyExit: there was such a signal before the function was done.
    """
    if not gc.isenabled():  # as main() has it while the program is loaded
        gc.freeze()
        gc.enable()
    return trio.run(_run, function, *arguments)


async def _run(function: Callable[..., Awaitable[_Result]], *arguments: object) -> _Result:
    stopped_by = 0
    heeded = [signum for signum in _IGNORABLE if signal.getsignal(signum) is not signal.SIG_IGN]

    async def watch_signals() -> None:
        nonlocal stopped_by
        async for signum in signals:
            stopped_by = signum
            nursery.cancel_scope.cancel()

    with trio.open_signal_receiver(signal.SIGTERM, *heeded) as signals:
        async with open_flat_nursery() as nursery:
            nursery.start_soon(watch_signals)
            result = await function(*arguments)
            nursery.cancel_scope.cancel()
            return result
    raise EarlyExit(SIGNALLED + stopped_by)
