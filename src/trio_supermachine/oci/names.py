"""The names of files in a layer."""

from __future__ import annotations

from .malformed import MalformedError

MAX_PATH = 4096
MAX_NAME = 255
MAX_DEPTH = 512  # directories above each other; each that is implied costs work and memory


def clean(name: bytes) -> bytes:
    """A name without what means nothing; the root is ``b""``.

    A name that begins with a slash is one below the layer's root too, as for other tools.

    :raises MalformedError: it has a ``..``, a NUL, or is too long or too deep.
    """
    if b"\0" in name:
        raise MalformedError(f"the name {show(name)} has a NUL")
    parts = [part for part in name.split(b"/") if part and part != b"."]
    for part in parts:
        if part == b"..":
            raise MalformedError(f"the name {show(name)} leaves the layer's root")
        if len(part) > MAX_NAME:
            raise MalformedError(f"the name {show(name)} is too long")
    path = b"/".join(parts)
    if len(path) >= MAX_PATH or len(parts) > MAX_DEPTH:
        raise MalformedError(f"the name {show(name)} is too long")
    return path


def join(parent: bytes, name: bytes) -> bytes:
    """``name`` in the directory ``parent``, which may be the root."""
    return parent + b"/" + name if parent else name


def show(name: bytes) -> str:
    """A name, or another text of an attacker's choice, for a message."""
    return ascii(name[:200].decode("utf-8", "backslashreplace"))
