"""Names of files in a layer, and what strangers wrote, shown to people."""

from __future__ import annotations

from . import MalformedError

MAX_PATH = 4096
MAX_NAME = 255
MAX_DEPTH = 512  # directories above each other; each that is implied costs work and memory


def clean(name: bytes) -> bytes:
    """Give a name without its empty parts and ``.``; the root is ``b""``.

    A name that begins with a slash is below the layer's root, too, as it is for other tools.

    :raises MalformedError: it has a ``..`` or a NUL, or is too long or too deep.
    """
    if b"\0" in name:
        raise MalformedError(f"the name {show_name(name)} has a NUL")
    parts = [part for part in name.split(b"/") if part and part != b"."]
    for part in parts:
        if part == b"..":
            raise MalformedError(f"the name {show_name(name)} leaves the layer's root")
        if len(part) > MAX_NAME:
            raise MalformedError(f"the name {show_name(name)} is too long")
    path = b"/".join(parts)
    if len(path) >= MAX_PATH or len(parts) > MAX_DEPTH:
        raise MalformedError(f"the name {show_name(name)} is too long")
    return path


def join(parent: bytes, name: bytes) -> bytes:
    """Give ``name`` in the directory ``parent``, which may be the root."""
    return parent + b"/" + name if parent else name


def show_name(name: bytes) -> str:
    """Quote a name for a message, in ASCII and cut at 200 bytes."""
    return ascii(name[:200].decode("utf-8", "backslashreplace"))


def show_text(text: str, limit: int = 512) -> str:
    """Give a text for a message: on one line, harmless to a terminal, and cut at ``limit``."""
    line = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    line = " ".join(line.split())
    return line if len(line) <= limit else line[:limit] + "..."
