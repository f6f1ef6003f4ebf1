"""The command line: ``trio-supermachine``."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the program ``trio-supermachine``."""
    # What is loaded stays: until that is done, the collector would look through it in vain.
    gc.disable()
    try:
        _open_standard_files()
        try:
            import click  # noqa: F401
        except ModuleNotFoundError:
            sys.exit(
                "trio-supermachine: error: the command line needs click; to get it:"
                " pip install 'trio-supermachine[cli]'"
            )
        from .app import run_app

        code = run_app(sys.argv[1:])
    except KeyboardInterrupt:  # Ctrl-C while all this is loaded, which takes a moment
        code = 128 + signal.SIGINT
    sys.exit(code)


def _open_standard_files() -> None:
    """Open ``/dev/null`` as stdin, stdout or stderr where this program was started without.

    Otherwise the next files that are opened would get their numbers.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
