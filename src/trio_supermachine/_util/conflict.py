"""What a stream needs to notice that two tasks use it at once."""

from __future__ import annotations

import trio


class OneAtATime:
    """A block that one task at a time may be in; another gets :exc:`trio.BusyResourceError`."""

    __slots__ = ("_busy", "_message")

    def __init__(self, message: str) -> None:
        self._message = message
        self._busy = False

    def __enter__(self) -> None:
        if self._busy:
            raise trio.BusyResourceError(self._message)
        self._busy = True

    def __exit__(self, *_: object) -> None:
        self._busy = False
