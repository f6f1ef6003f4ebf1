"""The console's bounded ring: one writer that never waits, any number of readers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import final

import trio

from .base import Console

RING_BYTES = 256 * 1024
_CHUNK = 64 * 1024
_LAST_WORDS = 8 * 1024


@final
class ConsoleRing(Console):
    """Ring of the newest bytes that an engine has fed into it.

    :param capacity: how many bytes that is.
    """

    def __init__(self, capacity: int = RING_BYTES) -> None:
        self._capacity = capacity
        self._ring = bytearray()
        self._start = 0  # position, in the whole output, of the ring's first byte
        self._ended = False
        self._news = trio.lowlevel.ParkingLot()

    def feed(self, data: bytes) -> None:
        """Append ``data``, dropping the oldest bytes beyond the capacity."""
        self._ring += data
        excess = len(self._ring) - self._capacity
        if excess > 0:
            del self._ring[:excess]
            self._start += excess
        self._news.unpark_all()

    def end(self) -> None:
        """Let readers finish, as no more output comes."""
        self._ended = True
        self._news.unpark_all()

    def tail(self, max_bytes: int = 4096) -> bytes:
        return bytes(self._ring[-max_bytes:]) if max_bytes > 0 else b""

    def last_words(self) -> str:
        """Give the first line of the panic that the output ends with; empty if there is none."""
        _, panic, rest = self.tail(_LAST_WORDS).partition(b"Kernel panic - ")
        return (panic + rest.splitlines()[0]).decode("utf-8", "replace") if panic and rest else ""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Reader(self)

    async def _read(self, position: int) -> tuple[bytes, int]:
        await trio.lowlevel.checkpoint()
        while position >= self._start + len(self._ring):
            if self._ended:
                return b"", position
            await self._news.park()
        offset = max(position - self._start, 0)
        chunk = bytes(self._ring[offset : offset + _CHUNK])
        return chunk, self._start + offset + len(chunk)


class _Reader:
    def __init__(self, ring: ConsoleRing) -> None:
        self._ring = ring
        self._position = 0

    def __aiter__(self) -> _Reader:
        return self

    async def __anext__(self) -> bytes:
        chunk, self._position = await self._ring._read(self._position)
        if not chunk:
            raise StopAsyncIteration
        return chunk
