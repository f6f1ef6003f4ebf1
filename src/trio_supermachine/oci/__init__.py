"""Formats of images, and the client of registries.

Everything that is read here was written by strangers. Each parser checks every type and bound of
its input, and raises :exc:`MalformedError` for what does not follow the format.
"""

from __future__ import annotations


class MalformedError(Exception):
    """Untrusted bytes do not follow their format, or break a bound.

    A parser does not know which image it reads. Its caller does, and raises
    :exc:`~trio_supermachine.ImageCorrupt` from this error.
    """
