"""The guest's physical memory, for devices.

A hostile guest chooses every address that a device gets. All of them go through
:meth:`GuestMemory.view`, which refuses those outside of the guest's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final


class GuestMemoryError(Exception):
    """Range of addresses that is not wholly inside the guest's memory."""


@final
class GuestMemory:
    """Ranges of guest-physical memory, each backed by writable bytes of this process.

    Views are plain memory. The guest may change them at any time, so copy before a check. All views
    must be gone before the mapping is removed.

    :param ranges: (guest-physical start, its bytes) of each; they must not overlap.
    """

    __slots__ = ("_ranges",)

    def __init__(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        self._ranges: tuple[tuple[int, int, memoryview], ...] = tuple(
            (start, start + view.nbytes, view.cast("B"))
            for start, view in sorted(ranges, key=_start)
        )
        end = 0
        for start, next_end, view in self._ranges:
            if view.readonly:
                raise ValueError("guest memory must be writable")
            if start < end:
                raise ValueError("ranges of guest memory overlap")
            end = next_end

    @property
    def ranges(self) -> tuple[tuple[int, memoryview], ...]:
        """(guest-physical start, its bytes) of each range, ascending."""
        return tuple((start, view) for start, _, view in self._ranges)

    @property
    def size(self) -> int:
        """Bytes of all ranges together."""
        return sum(end - start for start, end, _ in self._ranges)

    def view(self, address: int, length: int) -> memoryview:
        """Give a writable view of the ``length`` bytes at ``address``.

        :raises GuestMemoryError: they are not wholly inside one range.
        """
        for start, end, view in self._ranges:
            offset = address - start
            if offset >= 0 and 0 <= length <= end - address:
                return view[offset : offset + length]
        raise GuestMemoryError(f"no guest memory at {address:#x}, {length:#x} bytes")

    def read(self, address: int, length: int) -> bytes:
        """Copy the ``length`` bytes at ``address``. :raises GuestMemoryError: as :meth:`view`."""
        return bytes(self.view(address, length))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data``, of bytes, to ``address``. :raises GuestMemoryError: as :meth:`view`."""
        self.view(address, len(data))[:] = data

    def close(self) -> None:
        """Let go of the memory; every access fails from now on. Idempotent.

        Views that were given before stay valid.
        """
        ranges, self._ranges = self._ranges, ()
        for _, _, view in ranges:
            view.release()


def _start(item: tuple[int, memoryview]) -> int:
    return item[0]
