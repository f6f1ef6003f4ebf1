"""A carrier in memory: two muxers back to back in one program.

Each end takes packets out of its own muxer and puts them straight into the other's, so that nothing
is stored between them and each packet passes the checks that one on a socket passes. A
:class:`Line` joins the two ends. While somebody holds it, no packet moves in either direction, and
streams only wait.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, final

import trio

from .carrier import Carrier, Packets
from .packet import MAX_PAYLOAD, PacketDecoder
from .parking import Parking

#: Packets moved before other tasks get a turn.
_TURN: Final = 64


@final
class MemoryCarrier(Carrier):
    """One of the two ends of a :class:`Line`."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._peer = self  # the line sets it
        self._mux: Packets
        self._decoder = PacketDecoder()
        self._sender = Parking()
        self._closed = False

    def attach(self, mux: Packets) -> None:
        self._mux = mux

    def flush(self) -> None:
        self._sender.wake()

    async def serve(self) -> None:
        while not (self._closed or self._peer._closed):
            if self._movable:
                self._move()
                await trio.lowlevel.checkpoint()
            else:
                await self._sender.park()

    @property
    def _movable(self) -> bool:
        return (
            not (self._line.held or self._closed or self._peer._closed)
            and self._mux.core.has_output
            and not self._peer._mux.core.congested
        )

    def _move(self) -> None:
        peer = self._peer._mux
        for _ in range(_TURN):
            if not self._movable:
                break
            header, payload = self._mux.core.pull(MAX_PAYLOAD)
            for packet in self._decoder.feed(header + payload):
                connection = peer.core.receive(packet)
                if connection is not None:
                    peer.touched(connection)
        self._mux.pulled()
        # The peer may have answers now, or have waited for this side to get rid of its own.
        self._peer.flush()

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        self._mux.check_alive()
        await trio.lowlevel.checkpoint()
        self._line.hold()
        try:
            yield
        finally:
            self._line.release()

    def reset_peer(self) -> None:
        peer = self._peer._mux
        for connection in peer.core.forget_peer():
            peer.touched(connection)

    def close(self) -> None:
        self._closed = True
        self._sender.wake()
        self._peer._sender.wake()


@final
class Line:
    """The two ends of a carrier in memory.

    :ivar ends: give one to each of two muxers, whose CIDs mirror each other.
    """

    def __init__(self) -> None:
        self.ends: Final = (MemoryCarrier(self), MemoryCarrier(self))
        self.ends[0]._peer, self.ends[1]._peer = self.ends[1], self.ends[0]
        self._holders = 0

    @property
    def held(self) -> bool:
        """Whether no packet moves."""
        return self._holders > 0

    def hold(self) -> None:
        """Let no packet move until :meth:`release` was called as often as this."""
        self._holders += 1

    def release(self) -> None:
        """Undo one :meth:`hold`."""
        self._holders -= 1
        for end in self.ends:
            end.flush()
