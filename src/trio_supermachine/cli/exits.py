"""The ends of the program: exit codes, and one line on stderr that says why."""

from __future__ import annotations

import sys
from typing import Final

#: Exit codes as ``docker run`` and timeout(1) have them.
TIMED_OUT: Final = 124
OWN_ERROR: Final = 125
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
SIGNALLED: Final = 128


class EarlyExit(Exception):
    """The program ends with ``exit_code``; the text, if there is one, says why."""

    def __init__(self, exit_code: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code


def complain(message: str) -> None:
    """Print one line on stderr."""
    print(f"trio-supermachine: error: {printable(message)}", file=sys.stderr)


def printable(text: str) -> str:
    """Give ``text`` on one line, unable to drive a terminal: a guest may have chosen it."""
    text = " ".join(text.splitlines()).expandtabs()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
