"""How the command line reports what failed, and with which exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from typing import Final

from .._util.trace import CATEGORIES, VARIABLE, enabled
from ..errors import SupermachineError

#: Exit codes as ``docker run`` and timeout(1) have them.
TIMED_OUT: Final = 124
OWN_ERROR: Final = 125
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
SIGNALLED: Final = 128


class CommandNotStarted(Exception):
    """The command could not be started in the guest."""

    def __init__(self, program: str, error: OSError) -> None:
        super().__init__(f"cannot run {program!r}: {error.strerror or error}")
        missing = isinstance(error, FileNotFoundError)
        self.exit_code = NOT_FOUND if missing else NOT_EXECUTABLE


def report(exc: Exception) -> None:
    """Say on stderr what failed: one line for each thing, and the console where it tells why."""
    if all(enabled(category) for category in CATEGORIES):
        traceback.print_exception(exc)
    for failure in _leaves(exc):
        message = str(failure).partition("\n--- console ---\n")[0]
        if not isinstance(failure, (SupermachineError, CommandNotStarted)):
            message = f"{type(failure).__name__}: {message} ({VARIABLE}=all shows where)"
        complain("; ".join([message, *getattr(failure, "__notes__", ())]))
        # A guest that was asked to power off has nothing more to explain.
        console = getattr(failure, "console", "")
        if console and getattr(failure, "reason", "") != "shutdown":
            for line in ["the end of the guest's console:", *console.splitlines()]:
                print("  " + printable(line), file=sys.stderr)


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"trio-supermachine: error: {printable(message)}", file=sys.stderr)


def printable(text: str) -> str:
    """``text`` on one line, unable to drive a terminal: a guest or an image may have chosen it."""
    text = " ".join(text.splitlines()).expandtabs()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc
