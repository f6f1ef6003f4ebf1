"""A guard against two tasks that use one stream at once."""

from __future__ import annotations

import trio


class OneAtATime:
    """A block for one task at a time. A second one gets :exc:`trio.BusyResourceError`.

    :param message: the text of that error.
    """

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
