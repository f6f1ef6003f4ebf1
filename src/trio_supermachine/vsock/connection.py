"""The state of one vsock connection, without I/O: its ends, its credit, what it has received.

Theory of operation. A connection's state says what this side knows of it::

    dial --> DIALING --RESPONSE--> OPEN --close--> CLOSING --RST--> GONE
    a peer's REQUEST to a listener --> OPEN

- *DIALING*: REQUEST is owed or sent. Only RESPONSE and RST are answers to it; anything else resets
  the connection.
- *OPEN*: bytes move. Each direction may end by itself: ``ended_sending`` (by the local user, told
  as SHUTDOWN behind what is pending), ``peer_ended_sending``, ``peer_ended_receiving``.
- *CLOSING*: the local user has left, and both directions are told as ended. What the peer still
  sends is counted, as its credit goes on, and dropped. The ports stay taken until the peer's RST,
  so that no new connection is mistaken for this one.
- *GONE*: from every state, by an RST in either direction, by a broken rule, or by the carrier's
  end. Nothing moves any more. What was received before can still be taken out, except after a
  broken rule.

*Ends.* By section 5.10.6 of the specification an RST follows when both sides have ended sending,
or when one side ends both directions. So an RST behind ``peer_ended_sending`` is an orderly end,
and one without it breaks the stream.

*Credit.* The peer may send :data:`WINDOW` bytes beyond what the local user has taken out; more is a
fault. This side may send ``buf_alloc`` bytes beyond what the peer says it has forwarded. Counters
are plain integers here and modulo 2**32 on the wire: a peer's count is accepted if it goes forward,
and not beyond what was sent. New credit is announced with every packet, and by a packet of its
own when the peer may have less than half of its window left.

*A hostile peer* can make a connection hold :data:`WINDOW` bytes, however small its packets are, and
nothing else.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Final

import attrs

#: Bytes that a peer may have sent and the local user not taken out. Twice the window of an exec's
#: output, so that the credit of the two windows can share packets.
WINDOW: Final = 512 * 1024
#: Bytes that a peer has room for before it says so: the least of the agent's windows.
OPENING: Final = 4096
_U32: Final = 0xFFFF_FFFF

#: Payloads below this size are gathered. Otherwise a peer that sends single bytes could make a
#: full window cost many times its size in objects.
_SMALL: Final = 4096
_GATHER: Final = 64 * 1024

#: Credit is announced in steps of at least a window's fourth, lest a slow reader answer every byte.
_STEPS: Final = 4


class State(Enum):
    """Stage of a connection's life."""

    DIALING = "dialing"
    OPEN = "open"
    CLOSING = "closing"
    GONE = "gone"


class PeerFault(Exception):
    """Breach of one connection's rules by the peer, for which it is reset."""


@attrs.define(eq=False)
class Connection:
    """One end of a connection. :class:`Mux` owns and changes it; others read it."""

    local_port: int
    peer_port: int
    state: State

    #: The user has ended sending, the peer has ended sending or receiving.
    ended_sending: bool = False
    peer_ended_sending: bool = False
    peer_ended_receiving: bool = False
    #: Whether it ends as TCP's connections do: see :meth:`.VsockStream.end_like_tcp`.
    like_tcp: bool = False

    #: Bytes that the user wants sent and that no packet has taken.
    pending: memoryview | None = None
    queued: bool = False  # it is in the round of senders
    due: int = 0  # the control packets to send, as a set of the muxer's bits

    buffered: int = 0
    _chunks: deque[bytes | bytearray] = attrs.field(factory=deque, init=False)
    _taken: int = 0  # bytes of the first chunk that are out
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
        """Buffer a copy of the peer's payload.

        :raises PeerFault: there was no credit for it, or the peer has ended sending.
        """
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
        """Take buffered bytes out in order, at most ``max_bytes``; empty if there are none."""
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
        """Whether to announce credit: the peer may have less than half of its window left."""
        # Linux has no more on its way than its own receive window, whatever the credit.
        window = min(WINDOW, self._peer_window)
        return (
            self._received - self._announced > window // 2
            and self.forwarded - self._announced >= window // _STEPS
        )

    def announce(self) -> int:
        """Give ``fwd_cnt`` for a packet that goes out now, and remember it."""
        self._announced = self.forwarded
        return self._announced & _U32

    # --- sending ---

    @property
    def credit(self) -> int:
        """Bytes that the peer has room for."""
        credit = self._peer_window - (self._sent - self._peer_forwarded)
        return credit if credit > 0 else 0

    def spend(self, size: int) -> None:
        """Account for ``size`` bytes sent."""
        self._sent += size

    def learn_credit(self, window: int, forwarded: int) -> None:
        """Take over ``buf_alloc`` and ``fwd_cnt`` of a packet.

        An older count after a newer one is no fault: a kernel with several senders emits them so.

        :raises PeerFault: the peer has forwarded what was never sent.
        """
        step = (forwarded - self._peer_forwarded) & _U32
        if step <= self._sent - self._peer_forwarded:
            self._peer_forwarded += step
            self._peer_window = window
        elif step <= _U32 // 2:
            raise PeerFault("credit for data that was never sent")
