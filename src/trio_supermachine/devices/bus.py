"""A bus: ranges of addresses and their handlers, for I/O ports or memory-mapped registers.

A hostile guest chooses every address, size and value that comes in here. Handlers only see accesses
that lie wholly inside their range.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Final, Protocol, final

import attrs

_MASKS: Final = {size: (1 << 8 * size) - 1 for size in range(1, 9)}


class Handler(Protocol):
    """Registers of one range. ``offset`` is from its start; ``offset + size`` is within it."""

    def read(self, offset: int, size: int, /) -> int:
        """Give the little-endian value of ``size`` (1 to 8) bytes; bits beyond them are ignored."""

    def write(self, offset: int, size: int, value: int, /) -> None:
        """Store ``size`` bytes."""


@attrs.frozen
class Range:
    """``length`` addresses from ``start`` on, and their handler."""

    start: int
    length: int
    handler: Handler


@final
class Bus:
    """Router of accesses to handlers, in the caller's thread.

    Where there is no handler, reads give all ones and writes are ignored. An access that crosses an
    end of a range is split into bytes, each of which is routed by itself.

    :raises ValueError: two ranges overlap, or one is empty.
    """

    def __init__(self, ranges: Iterable[Range]) -> None:
        ordered = sorted(ranges, key=lambda item: item.start)
        end = 0
        for item in ordered:
            if item.length < 1 or item.start < end:
                raise ValueError(f"the range at {item.start:#x} is empty or overlaps another")
            end = item.start + item.length
        self._starts = [item.start for item in ordered]
        self._ranges = [(item.start, item.start + item.length, item.handler) for item in ordered]

    def read(self, address: int, size: int) -> int:
        """Give the value of ``size`` (1 to 8) bytes at ``address``."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            start, end, handler = self._ranges[index]
            if address + size <= end:
                return handler.read(address - start, size) & _MASKS[size]
        if size == 1:
            return 0xFF
        return sum(self.read(address + i, 1) << 8 * i for i in range(size))

    def write(self, address: int, size: int, value: int) -> None:
        """Store ``size`` (1 to 8) bytes at ``address``."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            start, end, handler = self._ranges[index]
            if address + size <= end:
                handler.write(address - start, size, value)
                return
        if size > 1:
            for i in range(size):
                self.write(address + i, 1, value >> 8 * i & 0xFF)
