"""Moves bytes between two streams, so that each end sees what the other one does."""

from __future__ import annotations

import socket
import struct
from typing import Final, Protocol, runtime_checkable

import trio

#: What is taken from one stream before it goes to the other: all that a direction ever holds.
_CHUNK: Final = 65536

_NO_LINGER: Final = struct.pack("ii", 1, 0)


@runtime_checkable
class _Abortable(Protocol):
    def abort(self) -> None: ...


async def reset(stream: trio.abc.AsyncResource) -> None:
    """Leave ``stream`` at once, so that its peer sees a reset and not an orderly end.

    What was sent and not read may be lost. The work is done at once, also when cancelled; then
    this is a checkpoint. A unix socket knows no reset: its peer sees an end, or ``ECONNRESET``
    if it had sent what nobody read.
    """
    if isinstance(stream, trio.SocketStream):
        if stream.socket.fileno() != -1:
            if stream.socket.family in (socket.AF_INET, socket.AF_INET6):
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            stream.socket.close()
        await trio.lowlevel.checkpoint()
    elif isinstance(stream, _Abortable):
        stream.abort()
        await trio.lowlevel.checkpoint()
    else:
        await trio.aclose_forcefully(stream)


async def relay(
    one: trio.abc.HalfCloseableStream, other: trio.abc.HalfCloseableStream
) -> tuple[int, int]:
    """Move bytes both ways until both directions have ended, then close both streams.

    The end of data of one stream becomes that of the other, while the opposite direction goes
    on. A stream whose data breaks off resets the other. A stream that takes no more data, but
    still gives some, gives it to its end, and then both are reset. In each direction at most
    64 KiB are held.

    Both streams are closed on return by any path; cancelled, it resets both.

    :returns: the bytes moved from ``one`` to ``other``, and from ``other`` to ``one``.
    """
    there = _Direction(one, other)
    back = _Direction(other, one)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.move, nursery.cancel_scope)
            await back.move(nursery.cancel_scope)
        orderly = there.orderly and back.orderly
    except BaseException:
        orderly = False
        raise
    finally:
        # Shielded, as both must be left; nothing in it waits.
        with trio.CancelScope(shield=True):
            for stream in (one, other):
                if orderly:
                    await trio.aclose_forcefully(stream)
                else:
                    await reset(stream)
    return there.moved, back.moved


class _Direction:
    __slots__ = ("moved", "orderly", "sink", "source")

    def __init__(
        self, source: trio.abc.HalfCloseableStream, sink: trio.abc.HalfCloseableStream
    ) -> None:
        self.source = source
        self.sink = sink
        self.moved = 0
        self.orderly = False

    async def move(self, both: trio.CancelScope) -> None:
        """Move data to its end. Where it breaks off, cancel ``both`` directions."""
        source, sink = self.source, self.sink
        while True:
            try:
                data = await source.receive_some(_CHUNK)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                both.cancel()
                return
            try:
                if not data:
                    await sink.send_eof()
                    break
                await sink.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            self.moved += len(data)
            del data  # while it waits it holds nothing
        self.orderly = True
