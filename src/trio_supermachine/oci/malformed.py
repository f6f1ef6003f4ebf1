"""The error by which the parsers here say that their input is wrong."""

from __future__ import annotations


class MalformedError(Exception):
    """Untrusted bytes do not follow their format, or break a bound.

    The parsers do not know which image they read; whoever called them raises
    :exc:`~trio_supermachine.errors.ImageCorrupt` from this.
    """
