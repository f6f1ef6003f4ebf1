"""Ranges: the bytes of a blob that an answer carries (RFC 9110, section 14.4)."""

from __future__ import annotations

import re

from .. import MalformedError

_CONTENT_RANGE = re.compile(r"bytes[ \t]+([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII)
_LENGTH = re.compile("[0-9]{1,19}", re.ASCII)


def bytes_to_skip(
    status: int, content_range: str | None, content_length: str | None, *, start: int, size: int
) -> int:
    """Compute how many bytes of an answer's body come before those that were asked for.

    Asked for were the bytes from ``start`` on, of a blob of ``size`` bytes. A server may answer
    with the whole blob instead.

    :raises MalformedError: the answer has other bytes, or a blob of another size.
    """
    length = None
    if content_length is not None and _LENGTH.fullmatch(content_length):
        length = int(content_length)
    if status != 206:
        if length is not None and length != size:
            raise MalformedError(f"the registry has {length} bytes of it, not {size}")
        return start
    match = None if content_range is None else _CONTENT_RANGE.fullmatch(content_range.strip())
    if match is None:
        raise MalformedError("the registry answered to a range without saying which")
    first, last = int(match[1]), int(match[2])
    if match[3] != "*" and int(match[3]) != size:
        raise MalformedError(f"the registry has {match[3]} bytes of it, not {size}")
    if first != start or not first <= last < size:
        raise MalformedError(f"the registry gave the bytes {first} to {last}, not from {start}")
    if length is not None and length != last - first + 1:
        raise MalformedError("the registry contradicts itself about the size of a range")
    return 0
