"""Moves bytes between two streams, so that each end sees what the other one does."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol, runtime_checkable

import trio

#: What is taken from one stream before it goes to the other: all that a direction ever holds.
_CHUNK: Final = 65536

_GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError)

_TCP: Final = (socket.AF_INET, socket.AF_INET6)
_NO_LINGER: Final = struct.pack("ii", 1, 0)


@runtime_checkable
class _Abortable(Protocol):
    def abort(self) -> None: ...


@runtime_checkable
class _Watchable(Protocol):
    def when_gone(self, call: Callable[[], None]) -> None: ...


async def reset(stream: trio.abc.AsyncResource) -> None:
    """Leave ``stream`` at once, so that its peer sees a reset and not an orderly end.

    What was sent and not read may be lost. The work is done at once, also when cancelled; then
    this is a checkpoint. A unix socket knows no reset: its peer sees an end, or ``ECONNRESET``
    if it had sent what nobody read.
    """
    if isinstance(stream, trio.SocketStream):
        reset_socket(stream)
        await trio.lowlevel.checkpoint()
    elif isinstance(stream, _Abortable):
        stream.abort()
        await trio.lowlevel.checkpoint()
    else:
        await trio.aclose_forcefully(stream)


def reset_socket(stream: trio.SocketStream) -> None:
    """:func:`reset` of a socket's stream. Plain and idempotent."""
    if stream.socket.fileno() != -1:
        if stream.socket.family in _TCP:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        stream.socket.close()


async def relay(
    one: trio.abc.HalfCloseableStream,
    other: trio.abc.HalfCloseableStream,
    *,
    early: bytes = b"",
) -> None:
    """Move bytes both ways until both directions have ended, then close both streams.

    The end of data of one stream becomes that of the other, while the opposite direction goes
    on. A stream whose data breaks off resets the other, and so does a guest's whose data has
    ended when it is reset. A stream that takes no more data, but
    still gives some, gives it to its end, and then both are reset. In each direction at most
    64 KiB are held.

    Both streams are closed on return by any path; cancelled, it resets both.

    :param early: what was received from ``one`` already.
    """
    there = _Direction(one, other, early)
    back = _Direction(other, one)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.move, back, nursery.cancel_scope)
            await back.move(there, nursery.cancel_scope)
    finally:
        orderly = there.ended and back.ended
        with trio.CancelScope(shield=True):  # nothing in it waits
            for stream in (one, other):
                if orderly:
                    await trio.aclose_forcefully(stream)
                else:
                    await reset(stream)


def _was_reset(stream: object) -> bool:
    """Whether an end of data on a stream, whose own data has not ended, was a reset.

    Linux tells a reset once. If sending hears of it, receiving sees an end, but the socket knows.
    """
    if not isinstance(stream, trio.SocketStream) or stream.socket.family not in _TCP:
        return False
    poll = select.poll()
    poll.register(stream.socket, 0)
    return any(what & (select.POLLHUP | select.POLLERR) for _, what in poll.poll(0))


class _Direction:
    __slots__ = ("_early", "_sink", "_source", "ended")

    def __init__(
        self,
        source: trio.abc.HalfCloseableStream,
        sink: trio.abc.HalfCloseableStream,
        early: bytes = b"",
    ) -> None:
        self._source = source
        self._sink = sink
        self._early = early
        #: All was moved, and the end told.
        self.ended = False

    async def move(self, opposite: _Direction, both: trio.CancelScope) -> None:
        """Move data to its end. Where it breaks off, cancel ``both`` directions."""
        source, sink = self._source, self._sink
        data: bytes | bytearray = self._early
        self._early = b""
        while True:
            if data:
                try:
                    await sink.send_all(data)
                except _GONE:
                    return
                data = b""  # while it waits it holds nothing
            try:
                data = await source.receive_some(_CHUNK)
            except _GONE:
                both.cancel()
                return
            if not data:
                break
        if opposite.ended or not _was_reset(source):
            with suppress(*_GONE):
                await sink.send_eof()
                self.ended = True
                if isinstance(source, _Watchable):
                    source.when_gone(both.cancel)
