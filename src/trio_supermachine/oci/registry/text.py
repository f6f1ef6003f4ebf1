"""Text from outside in messages for people."""

from __future__ import annotations

_MAX = 512


def shown(text: str, limit: int = _MAX) -> str:
    """``text`` on one line, without what could drive a terminal, and cut at ``limit``."""
    clean = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    clean = " ".join(clean.split())
    return clean if len(clean) <= limit else clean[:limit] + "..."
