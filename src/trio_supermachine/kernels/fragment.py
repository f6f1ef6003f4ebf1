"""The small kernel's configuration: the lines that it must have, and those that are missing."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

_DIRECTORY: Final = Path(__file__).parent.parent / "guest/kernel"
_LINE: Final = re.compile(r"(CONFIG_\w+)=(.+)|# (CONFIG_\w+) is not set")


def read_fragment(arch: str) -> str:
    """Read the lines for ``arch``: those that all architectures share, and its own."""
    return "".join((_DIRECTORY / f"{name}.config").read_text() for name in ("common", arch))


def fragment_digest(fragment: str) -> str:
    """Compute a short digest of the options in ``fragment``. Comments and order do not count."""
    lines = sorted(f"{name}={value}\n" for name, value in _options(fragment).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def missing_options(fragment: str, config: str) -> list[str]:
    """Find the lines of ``fragment`` that the finished configuration ``config`` lacks.

    Kconfig silently drops an option that it does not know, or whose dependency is not met.
    """
    has = _options(config)
    return [
        f"{name}={value}"
        for name, value in _options(fragment).items()
        if has.get(name, "n") != value
    ]


def _options(text: str) -> dict[str, str]:
    found = {}
    for line in text.splitlines():
        if match := _LINE.fullmatch(line.strip()):
            name, value, unset = match.groups()
            found[name or unset] = value or "n"
    return found
