"""The order of kernel releases."""

from __future__ import annotations

import re


def version_key(version: str) -> tuple[tuple[int, str], ...]:
    """Give a key that sorts kernel releases as people would."""
    parts = re.findall(r"\d+|[^\d]+", version)
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts)
