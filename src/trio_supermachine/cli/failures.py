"""The report of what failed: one line for each thing, and the console where it tells why."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator

from .._util.trace import CATEGORIES, VARIABLE, enabled
from ..errors import SupermachineError
from .exits import complain, printable


def report(exc: Exception) -> None:
    """Print on stderr what failed."""
    if all(enabled(category) for category in CATEGORIES):
        traceback.print_exception(exc)
    for failure in _leaves(exc):
        message = str(failure).partition("\n--- console ---\n")[0]
        if not isinstance(failure, SupermachineError):
            message = f"{type(failure).__name__}: {message} ({VARIABLE}=all shows where)"
        complain("; ".join([message, *getattr(failure, "__notes__", ())]))
        # A guest that was asked to power off has nothing more to explain.
        console = getattr(failure, "console", "")
        if console and getattr(failure, "reason", "") != "shutdown":
            for line in ["the end of the guest's console:", *console.splitlines()]:
                print("  " + printable(line), file=sys.stderr)


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc
