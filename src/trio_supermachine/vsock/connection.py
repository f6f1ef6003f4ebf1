"""The state of one vsock connection, without I/O: its ends, its credit, what it has received."""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Final

import attrs

#: Twice that of an exec's output, whose WINDOW frames then carry the credit too.
WINDOW: Final = 512 * 1024
#: What a peer has room for before it says so: the least of the agent's windows.
OPENING: Final = 4096
_U32: Final = 0xFFFF_FFFF

#: Payloads below this are gathered, so that a peer that sends single bytes cannot make a full
#: window cost many times its size in objects.
_SMALL: Final = 4096
_GATHER: Final = 64 * 1024

#: Announce credit in steps of at least a window's fourth, lest a slow reader answer every byte.
_STEPS: Final = 4


class State(Enum):
    """Where a connection is in its life."""

    DIALING = "dialing"
    OPEN = "open"
    CLOSING = "closing"  # the local user has left; the peer's RST is awaited
    GONE = "gone"


class PeerFault(Exception):
    """The peer broke the rules of one connection, which is reset for it."""


@attrs.define(eq=False)
class Connection:
    """One end of a connection. :class:`Mux` owns and changes it; others read it.

    Counters are plain integers that never wrap; only the wire has them modulo 2**32.
    """

    local_port: int
    peer_port: int
    state: State

    #: The user has ended sending, the peer has ended sending or receiving.
    ended_sending: bool = False
    peer_ended_sending: bool = False
    peer_ended_receiving: bool = False
    #: It ends as TCP's connections do: see :meth:`.VsockStream.end_like_tcp`.
    like_tcp: bool = False

    #: What the user wants sent and has not been packed into a packet.
    pending: memoryview | None = None
    queued: bool = False  # in the round of senders
    due: int = 0  # control packets to send, as a set of bits

    buffered: int = 0
    _chunks: deque[bytes | bytearray] = attrs.field(factory=deque, init=False)
    _taken: int = 0  # how much of the first chunk is out
    _received: int = 0
    _announced: int = 0

    _sent: int = 0
    _peer_forwarded: int = 0
    _peer_window: int = 0

    # --- receiving ---

    @property
    def forwarded(self) -> int:
        """Bytes that the user has taken out."""
        return self._received - self.buffered

    def take_in(self, payload: bytes | memoryview) -> None:
        """Buffer a payload from the peer, copying it. :raises PeerFault: no credit, or no right."""
        size = len(payload)
        if self.peer_ended_sending:
            raise PeerFault("data after the end of data")
        if self._received + size - self._announced > WINDOW:
            raise PeerFault("more data than there was credit for")
        self._received += size
        if self.state is State.CLOSING or not size:
            if self.like_tcp and size:
                raise PeerFault("data that nobody will read")
            return
        self.buffered += size
        if size >= _SMALL:
            self._chunks.append(bytes(payload))
            return
        tail = self._chunks[-1] if self._chunks else None
        if isinstance(tail, bytearray) and len(tail) + size <= _GATHER:
            tail += payload
        else:
            self._chunks.append(bytearray(payload))

    def take_out(self, max_bytes: int | None) -> bytes:
        """Buffered bytes in order, at most ``max_bytes``; empty if there are none."""
        if not self._chunks:
            return b""
        head = self._chunks[0]
        start = self._taken
        size = len(head) - start
        if max_bytes is not None and size > max_bytes:
            size = max_bytes
            self._taken += size
            with memoryview(head) as view:
                chunk = bytes(view[start : self._taken])
        else:
            del self._chunks[0]
            self._taken = 0
            chunk = bytes(head[start:] if start else head)
        self.buffered -= size
        return chunk

    def drop(self) -> None:
        """Forget what is buffered: the user has left."""
        self._chunks.clear()
        self._taken = 0
        self.buffered = 0

    @property
    def credit_due(self) -> bool:
        """Whether the peer should hear of the credit it has: it may hold less than half.

        Linux never has more on its way than its own receive window, whatever the credit.
        """
        window = min(WINDOW, self._peer_window)
        return (
            self._received - self._announced > window // 2
            and self.forwarded - self._announced >= window // _STEPS
        )

    def announce(self) -> int:
        """The ``fwd_cnt`` for a packet that goes out now."""
        self._announced = self.forwarded
        return self._announced & _U32

    # --- sending ---

    @property
    def credit(self) -> int:
        """How many bytes the peer has room for."""
        credit = self._peer_window - (self._sent - self._peer_forwarded)
        return credit if credit > 0 else 0

    def spend(self, size: int) -> None:
        """Account for ``size`` bytes sent."""
        self._sent += size

    def learn_credit(self, window: int, forwarded: int) -> None:
        """Take ``buf_alloc`` and ``fwd_cnt`` of a packet. :raises PeerFault: they cannot be true.

        A kernel with several senders may emit an older count after a newer one: that is no fault.
        """
        step = (forwarded - self._peer_forwarded) & _U32
        if step <= self._sent - self._peer_forwarded:
            self._peer_forwarded += step
            self._peer_window = window
        elif step <= _U32 // 2:
            raise PeerFault("credit for data that was never sent")
