"""The muxer: many connections over one carrier of packets, without I/O. Packets in, packets out.

Theory of operation. :class:`Mux` owns the connections (:mod:`.connection` has their states) and
knows nothing of what carries the packets. Roles are symmetric: two muxers back to back make a pair.

*What it owes.* Nothing is sent in the call that asks for it. A call notes what is owed, and
:meth:`Mux.pull` makes the next packet out of it, in this order:

1. *Stray* resets: answers to packets that no connection wants. They are a set of addresses.
2. *Control* packets. Each connection has a set of bits (``due``), and two calls that owe the same
   are one bit. The packets of one connection go out in the order of the bits: REQUEST comes before
   credit, SHUTDOWN before RST. Connections follow in the order in which they came to owe something.
3. *Data*: connections that have both bytes to send and credit, one packet a turn.

So a connection's SHUTDOWN must not be owed while bytes of it are pending: they would follow it.
:meth:`Mux.end_sending` leaves that to the pull that takes the last byte.

*Ports.* A connection is known by its two ports. A dial takes the next ephemeral port that is free
towards the peer's port. A restored guest does not know yet that its connections are gone, so the
port to begin with is part of a device's state (:attr:`Mux.next_port`).

*Bounds.* The peer is not trusted. It can make this side remember

- :data:`MAX_CONNECTIONS` connections, those of backlogs too, with a window of bytes each;
- of them :data:`MAX_CLOSING` that the local user has left and whose RST has not come: beyond, the
  oldest is reset and forgotten;
- about :data:`MAX_CONTROL` answers: beyond, the muxer is :attr:`Mux.congested`, and its carrier
  takes in nothing until some are out.

What a peer does wrong costs it one connection (:exc:`~.connection.PeerFault` resets it). A packet
between other CIDs is answered by a reset and touches nothing. Bytes that are no packets at all are
the carrier's business.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import Final

import attrs

from .connection import OPENING, WINDOW, Connection, PeerFault, State
from .packet import GUEST_CID, HOST_CID, MAX_PAYLOAD, Op, Packet, Shutdown, pack_header

MAX_CONNECTIONS: Final = 4096
#: Connections that may wait for the peer's RST after the local user has left.
MAX_CLOSING: Final = 1024
#: Connections with control packets to send, and stray resets, at which reading pauses.
MAX_CONTROL: Final = 4096

_FIRST_EPHEMERAL: Final = 0x4000_0000
_LAST_EPHEMERAL: Final = 0xBFFF_FFFF

# Bits of Connection.due, in the order in which the packets go out.
_REQUEST: Final = 1
_RESPONSE: Final = 2
_CREDIT: Final = 4
_NO_RECEIVE: Final = 8
_NO_SEND: Final = 16
_RST: Final = 32
_SHUTDOWN: Final = _NO_RECEIVE | _NO_SEND

_OPS: Final = {
    _REQUEST: Op.REQUEST,
    _RESPONSE: Op.RESPONSE,
    _CREDIT: Op.CREDIT_UPDATE,
    _NO_RECEIVE: Op.SHUTDOWN,
    _NO_SEND: Op.SHUTDOWN,
    _RST: Op.RST,
}


@attrs.define(eq=False)
class Listening:
    """A port that accepts, and its backlog: the connections that nobody has accepted yet."""

    port: int
    limit: int
    backlog: deque[Connection] = attrs.Factory(deque)


class Mux:
    """The connections of one machine.

    Packets that come in go to :meth:`receive`; :meth:`pull` gives those to send. The other methods
    are what the local user does.

    :param max_payload: bytes that a packet may have.
    """

    def __init__(
        self,
        *,
        local_cid: int = HOST_CID,
        peer_cid: int = GUEST_CID,
        max_payload: int = MAX_PAYLOAD,
    ) -> None:
        self.local_cid = local_cid
        self.peer_cid = peer_cid
        self.max_payload = max_payload
        #: Connections whose ``pending`` has been packed since the user last cleared this.
        self.drained: list[Connection] = []
        self._connections: dict[tuple[int, int], Connection] = {}
        self._listening: dict[int, Listening] = {}
        self._senders: deque[Connection] = deque()
        self._control: deque[Connection] = deque()
        self._stray: dict[tuple[int, int, int], None] = {}  # local CID, local port, peer's port
        self._closing: dict[Connection, None] = {}
        self._next_port = _FIRST_EPHEMERAL

    # --- what the local user does ---

    def dial(self, port: int) -> Connection:
        """Ask for a connection to the peer's ``port``.

        Bytes that are offered before the peer has answered follow the request, :data:`OPENING` of
        them at most.

        :raises OSError: (``EMFILE``) there are too many connections.
        """
        if len(self._connections) >= MAX_CONNECTIONS:
            raise OSError(errno.EMFILE, "too many vsock connections")
        while (local := self._next_port, port) in self._connections:
            self._advance_port()
        self._advance_port()
        connection = Connection(local, port, State.DIALING)
        connection.learn_credit(OPENING, 0)
        self._connections[local, port] = connection
        self._owe(connection, _REQUEST)
        return connection

    def listen(self, port: int, backlog: int) -> Listening:
        """Accept connections to ``port``. :raises OSError: (``EADDRINUSE``) the port is taken."""
        if port in self._listening:
            raise OSError(errno.EADDRINUSE, f"vsock port {port} already has a listener")
        listening = self._listening[port] = Listening(port, backlog)
        return listening

    def unlisten(self, listening: Listening) -> None:
        """Refuse connections from now on, and reset those of the backlog. Idempotent."""
        if self._listening.get(listening.port) is listening:
            del self._listening[listening.port]
        while listening.backlog:
            self.abort(listening.backlog.popleft())

    def offer(self, connection: Connection, data: memoryview) -> None:
        """Send ``data`` as credit and the other senders allow."""
        connection.pending = data
        self._enqueue(connection)

    def withdraw(self, connection: Connection) -> None:
        """Do not send the rest of what was offered."""
        connection.pending = None

    def read(self, connection: Connection, max_bytes: int | None) -> bytes:
        """Take received bytes; empty if there are none."""
        data = connection.take_out(max_bytes)
        if connection.credit_due and connection.state is State.OPEN:
            self._owe(connection, _CREDIT)
        return data

    def end_sending(self, connection: Connection) -> None:
        """Tell the peer that no more data comes, after what is pending. Idempotent."""
        if not connection.ended_sending:
            connection.ended_sending = True
            begun = connection.state in (State.DIALING, State.OPEN)
            if begun and connection.pending is None:
                self._owe(connection, _NO_SEND)

    def close(self, connection: Connection, *, telling: bool = True) -> None:
        """Leave. What was packed into packets still arrives; what is pending is dropped.

        The ports stay taken until the peer's RST.

        :param telling: send SHUTDOWN. Without it the peer is known to be about to send its own,
            which this side answers by RST.
        """
        if connection.state is not State.OPEN:
            self.abort(connection)
            return
        end_is_told = connection.ended_sending and connection.pending is None
        connection.pending = None
        if connection.like_tcp:
            # Only the end of sending is told. The peer ends in its own time; what it sends until
            # then resets the connection.
            telling = False
            if not end_is_told:
                self._owe(connection, _NO_SEND)
        connection.ended_sending = True
        connection.state = State.CLOSING
        connection.drop()
        if telling:
            self._owe(connection, _SHUTDOWN)
        if connection.like_tcp and connection.peer_ended_sending:
            self._owe(connection, _RST)
            self._forget(connection)
            return
        self._closing[connection] = None
        if len(self._closing) > MAX_CLOSING:
            oldest = next(iter(self._closing))
            self._owe(oldest, _RST)
            self._forget(oldest)

    def abort(self, connection: Connection) -> None:
        """Leave by an RST; what has not been sent is lost. Idempotent."""
        if connection.state is not State.GONE:
            unsaid = connection.due & _REQUEST
            connection.due = 0
            if not unsaid:
                self._owe(connection, _RST)
            self._forget(connection)
        connection.drop()

    @property
    def next_port(self) -> int:
        """Local port that the next dial tries first."""
        return self._next_port

    @next_port.setter
    def next_port(self, port: int) -> None:
        if not _FIRST_EPHEMERAL <= port <= _LAST_EPHEMERAL:
            raise ValueError(f"{port} is not an ephemeral vsock port")
        self._next_port = port

    def forget_peer(self) -> list[Connection]:
        """End the connections of a peer that has begun anew, as if it had reset each; give them.

        Nothing is owed to it any more. Dials that it has not heard of stay, and so do listeners.
        """
        self._stray.clear()
        gone = [c for c in list(self._connections.values()) if not c.due & _REQUEST]
        for connection in gone:
            self._receive_reset(connection)
        return gone

    def shut(self) -> None:
        """Forget all connections, as nothing carries packets any more."""
        for connection in list(self._connections.values()):
            self._forget(connection)
        self._senders.clear()
        self._control.clear()
        self._stray.clear()

    # --- what the peer does ---

    def receive(self, packet: Packet) -> Connection | None:
        """Act on a packet; give the connection whose state may have changed.

        A new connection is in the :attr:`Listening.backlog` of its port.
        """
        src_cid, dst_cid, src_port, dst_port, op, flags, window, forwarded, payload = packet
        connection = self._connections.get((dst_port, src_port))
        if src_cid != self.peer_cid or dst_cid != self.local_cid:
            if op is not Op.RST:
                self._stray[dst_cid, dst_port, src_port] = None
            return None
        if connection is None:
            return self._receive_unknown(packet)
        try:
            if op is Op.RST:
                self._receive_reset(connection)
                return connection
            if connection.state is State.DIALING:
                if op is not Op.RESPONSE:
                    raise PeerFault("a packet before the response")
                connection.state = State.OPEN
            elif op is Op.RESPONSE or op is Op.REQUEST:
                raise PeerFault("a handshake on an open connection")
            connection.learn_credit(window, forwarded)
            if op is Op.RW:
                connection.take_in(payload)
            elif op is Op.SHUTDOWN:
                self._receive_shutdown(connection, flags)
            elif op is Op.CREDIT_REQUEST:
                self._owe(connection, _CREDIT)
        except PeerFault:
            self._reset(connection)
            return connection
        if connection.pending is not None:
            self._enqueue(connection)
        return connection

    def refuse(self, src_cid: int, dst_cid: int, src_port: int, dst_port: int) -> Connection | None:
        """Answer a packet that is no packet of a stream by RST; give the connection that it ends.

        The addresses are those of the packet.
        """
        connection = self._connections.get((dst_port, src_port))
        if src_cid != self.peer_cid or dst_cid != self.local_cid or connection is None:
            self._stray[dst_cid, dst_port, src_port] = None
            return None
        self._reset(connection)
        return connection

    def _receive_unknown(self, packet: Packet) -> Connection | None:
        if packet.op is Op.RST:
            return None
        listening = self._listening.get(packet.dst_port) if packet.op is Op.REQUEST else None
        if (
            listening is None
            or len(listening.backlog) >= listening.limit
            or len(self._connections) >= MAX_CONNECTIONS
        ):
            self._stray[self.local_cid, packet.dst_port, packet.src_port] = None
            return None
        connection = Connection(packet.dst_port, packet.src_port, State.OPEN)
        connection.learn_credit(packet.buf_alloc, 0)
        self._connections[packet.dst_port, packet.src_port] = connection
        listening.backlog.append(connection)
        self._owe(connection, _RESPONSE)
        return connection

    def _receive_reset(self, connection: Connection) -> None:
        connection.due = 0
        self._forget(connection)
        if not connection.peer_ended_sending:
            self._leave_backlog(connection)

    def _receive_shutdown(self, connection: Connection, flags: int) -> None:
        if connection.like_tcp and not connection.peer_ended_sending and flags & 3 == 3:
            self._reset(connection, keeping=True)
            return
        if flags & Shutdown.NO_RECEIVE:
            connection.peer_ended_receiving = True
        if flags & Shutdown.NO_SEND:
            connection.peer_ended_sending = True
        if connection.peer_ended_sending and (
            connection.peer_ended_receiving or connection.ended_sending
        ):
            self._owe(connection, _RST)
            self._forget(connection)

    def _reset(self, connection: Connection, *, keeping: bool = False) -> None:
        """Reset a connection whose peer broke the rules.

        :param keeping: let the local user read what was received before.
        """
        connection.due = 0
        self._owe(connection, _RST)
        self._forget(connection)
        if not keeping:
            connection.drop()
        connection.peer_ended_sending = False
        self._leave_backlog(connection)

    def _leave_backlog(self, connection: Connection) -> None:
        listening = self._listening.get(connection.local_port)
        if listening is not None and connection in listening.backlog:
            listening.backlog.remove(connection)

    # --- what is to be sent ---

    @property
    def congested(self) -> bool:
        """Whether too many answers wait to be sent: the carrier takes no packets in until then."""
        return len(self._control) + len(self._stray) >= MAX_CONTROL

    @property
    def has_output(self) -> bool:
        """Whether :meth:`pull` would give a packet."""
        if self._stray:
            return True
        control = self._control
        while control:
            if control[0].due:
                return True
            control.popleft()
        senders = self._senders
        while senders:
            connection = senders[0]
            if connection.pending and connection.credit:
                return True
            connection.queued = False
            senders.popleft()
        return False

    def pull(self, room: int) -> tuple[bytes, memoryview | bytes]:
        """Give the next packet, as its header and payload; only if :attr:`has_output`.

        The payload is a view of the bytes that the user offered, who may change them in its next
        step: send or copy it at once.

        :param room: bytes that the payload may have, 1 at least.
        """
        if self._stray:
            cid, local, peer = key = next(iter(self._stray))
            del self._stray[key]
            return pack_header(cid, self.peer_cid, local, peer, 0, Op.RST, 0, 0, 0), b""
        if self._control:
            return self._pull_control(), b""
        senders = self._senders
        connection = senders.popleft()
        pending = connection.pending
        assert pending is not None
        payload = pending
        take = min(room, self.max_payload, connection.credit)
        if take < len(pending):
            payload = pending[:take]
            connection.pending = pending[take:]
            senders.append(connection)
        else:
            take = len(pending)
            connection.pending = None
            connection.queued = False
            self.drained.append(connection)
            if connection.ended_sending:
                self._owe(connection, _NO_SEND)
        connection.spend(take)
        return self._header(connection, take, Op.RW, 0), payload

    def _pull_control(self) -> bytes:
        """Make the first control packet that the first connection owes."""
        connection = self._control[0]
        due = connection.due
        said = due & -due
        op = _OPS[said]
        flags = 0
        if said & _SHUTDOWN:
            said = due & _SHUTDOWN
            flags = said // _NO_RECEIVE
        connection.due = due & ~said
        if not connection.due:
            self._control.popleft()
        return self._header(connection, 0, op, flags)

    def _header(self, connection: Connection, length: int, op: Op, flags: int) -> bytes:
        local, peer = connection.local_port, connection.peer_port
        taken = connection.announce()
        return pack_header(
            self.local_cid, self.peer_cid, local, peer, length, op, flags, WINDOW, taken
        )

    # --- bookkeeping ---

    def _owe(self, connection: Connection, bits: int) -> None:
        if not connection.due:
            self._control.append(connection)
        connection.due |= bits

    def _enqueue(self, connection: Connection) -> None:
        if not connection.queued and connection.credit:
            connection.queued = True
            self._senders.append(connection)

    def _forget(self, connection: Connection) -> None:
        connection.state = State.GONE
        connection.pending = None
        self._connections.pop((connection.local_port, connection.peer_port), None)
        self._closing.pop(connection, None)

    def _advance_port(self) -> None:
        self._next_port = (
            _FIRST_EPHEMERAL if self._next_port == _LAST_EPHEMERAL else self._next_port + 1
        )
