"""The relay of bytes between two streams, so that each end sees what the other one does.

A relay has two directions, each with a task that takes a chunk from its source and sends it to its
sink. The pace of the slower side passes through, since a direction holds one chunk of 64 KiB at
most, and none while it waits for data. A direction ends in one of three ways:

- *The source ends orderly* (a FIN, close_notify, SHUTDOWN of one direction). All has been moved, so
  the sink is told the end of data. The opposite direction goes on. When both have ended so, both
  streams are closed.
- *The source breaks off* (a reset, or somebody has closed it). What was under way is lost, and the
  other end must hear of it: both directions stop, and both streams are reset.
- *The sink takes no more.* Its peer may still be sending, so only this direction stops. The
  opposite one goes on to its end, and then both streams are reset.

A reset is to be told from an orderly end, or a client would take a truncated answer for a whole
one. Two cases are hard. On TCP, Linux tells a reset once: if sending hears of it, receiving sees an
orderly end. So at an end of data the socket is asked whether both its directions are gone
(``POLLHUP``). And a guest's stream whose data has ended may be reset later, when nobody receives
from it any more; the stream calls back then (``when_gone``), and the relay stops as for a reset.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol, runtime_checkable

import trio

#: Bytes that are taken from one stream before they go to the other: all that a direction holds.
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

    Data that was sent and not read may be lost. The work is done at once, also when cancelled;
    then this is a checkpoint. A unix socket knows no reset: its peer sees an end, or
    ``ECONNRESET`` if data of its own is unread.
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
    """Leave a socket's stream as :func:`reset` does. Plain and idempotent."""
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

    Both streams are closed on return by any path; cancelled, it resets both.

    :param early: bytes that were received from ``one`` already.
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
    """Say whether the end of data that a stream has given was a reset.

    It makes sense while nobody has ended sending on it.
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
        #: All was moved, and the sink was told the end.
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
                data = b""  # hold nothing while waiting
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
