"""Host programs that are run to their end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Any

import trio

from .nursery import raise_lone


async def run_process(
    command: Sequence[str | os.PathLike[str]], **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run a program as :func:`trio.run_process` does, but raise a lone error as itself.

    Trio's call raises a group around what its nursery sees, such as one :exc:`KeyboardInterrupt`.
    """
    try:
        return await trio.run_process(command, **options)
    except BaseExceptionGroup as group:
        raise_lone(group)
        raise
