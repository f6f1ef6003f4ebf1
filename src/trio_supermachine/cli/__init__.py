"""The command line: ``trio-supermachine``."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """The entry point of the program ``trio-supermachine``."""
    try:
        import click  # noqa: F401
    except ModuleNotFoundError:
        sys.exit(
            "trio-supermachine: error: the command line needs click; to get it:"
            " pip install 'trio-supermachine[cli]'"
        )
    from .app import run_app

    sys.exit(run_app(sys.argv[1:]))
