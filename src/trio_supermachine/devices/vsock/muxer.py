"""Many connections over one carrier of packets, without I/O: packets in, packets out.

Roles are symmetric, so two muxers back to back make a pair. The peer is not trusted: what it
can make this side remember is bounded, and what it does wrong costs it one connection, or the
carrier (:exc:`VsockProtocolError`) if packets cannot be told apart any more.
"""

from __future__ import annotations

import errno
from collections import deque
from enum import Enum
from typing import Final

import attrs

from .connection import WINDOW, Connection, PeerFault, State
from .packet import (
    GUEST_CID,
    HOST_CID,
    MAX_PAYLOAD,
    Op,
    Packet,
    Shutdown,
    VsockProtocolError,
    pack_header,
)

MAX_CONNECTIONS: Final = 4096
#: Connections that wait for the peer's RST after the local user has left.
MAX_CLOSING: Final = 1024
#: Connections with control packets to send, and stray resets, before reading pauses.
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

#: Buffers in one gathered write: Linux takes 1024.
_MAX_BUFFERS: Final = 512


@attrs.define(eq=False)
class Listening:
    """A port that accepts, and the connections that nobody has taken yet."""

    port: int
    limit: int
    backlog: deque[Connection] = attrs.Factory(deque)


class _Voice(Enum):
    TALKING = "talking"
    FREEZING = "freezing"  # silent, and the peer may still have something to say
    STILL = "still"


class Mux:
    """The connections of one machine.

    Feed it with :meth:`receive`, act with the methods below, and send what :meth:`pull` gives.
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
        self._stray: dict[tuple[int, int], None] = {}
        self._closing: dict[Connection, None] = {}
        self._carrier_ops: list[Op] = []
        self._voice = _Voice.TALKING
        self._stillness_wanted = False
        self._next_port = _FIRST_EPHEMERAL

    # --- what the local user does ---

    def dial(self, port: int) -> Connection:
        """Ask for a connection to the peer's ``port``. :raises OSError: EMFILE, too many."""
        if len(self._connections) >= MAX_CONNECTIONS:
            raise OSError(errno.EMFILE, "too many vsock connections")
        while (local := self._next_port, port) in self._connections:
            self._advance_port()
        self._advance_port()
        connection = Connection(local, port, State.DIALING)
        self._connections[local, port] = connection
        self._owe(connection, _REQUEST)
        return connection

    def listen(self, port: int, backlog: int) -> Listening:
        """Accept connections to ``port``. :raises OSError: EADDRINUSE."""
        if port in self._listening:
            raise OSError(errno.EADDRINUSE, f"vsock port {port} already has a listener")
        listening = self._listening[port] = Listening(port, backlog)
        return listening

    def unlisten(self, listening: Listening) -> None:
        """Refuse connections from now on, and reset those that nobody took. Idempotent."""
        if self._listening.get(listening.port) is listening:
            del self._listening[listening.port]
        while listening.backlog:
            self.abort(listening.backlog.popleft())

    def offer(self, connection: Connection, data: memoryview) -> None:
        """Send ``data`` as credit and the other senders allow.

        What is not ``bytes`` is copied as it is packed: a packet may have to wait for the
        carrier when the user is free to change the data again.
        """
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
        """Tell the peer that no more data comes. Idempotent."""
        if not connection.ended_sending:
            connection.ended_sending = True
            if connection.state is State.OPEN:
                self._owe(connection, _NO_SEND)

    def close(self, connection: Connection) -> None:
        """Leave, after what has been sent; the connection is remembered until the peer's RST."""
        if connection.state is not State.OPEN:
            self.abort(connection)
            return
        connection.pending = None
        connection.ended_sending = True
        connection.state = State.CLOSING
        connection.drop()
        self._owe(connection, _NO_RECEIVE | _NO_SEND)
        self._closing[connection] = None
        if len(self._closing) > MAX_CLOSING:
            oldest = next(iter(self._closing))
            self._owe(oldest, _RST)
            self._forget(oldest)

    def abort(self, connection: Connection) -> None:
        """Leave by a RST; what has not been sent is lost. Idempotent."""
        if connection.state is not State.GONE:
            unsaid = connection.due & _REQUEST
            connection.due = 0
            if not unsaid:
                self._owe(connection, _RST)
            self._forget(connection)
        connection.drop()

    def freeze(self) -> None:
        """Send nothing, and ask the peer to send nothing, from here to :meth:`thaw`."""
        self._stillness_wanted = True
        if self._voice is _Voice.TALKING:
            self._voice = _Voice.FREEZING
            self._carrier_ops.append(Op.FREEZE)

    @property
    def still(self) -> bool:
        """Whether nothing is under way in either direction."""
        return self._voice is _Voice.STILL

    def thaw(self) -> None:
        """Go on, both: at once, or when the peer has come to rest as it was asked to."""
        self._stillness_wanted = False
        if self._voice is _Voice.STILL:
            self._voice = _Voice.TALKING
            self._carrier_ops.append(Op.THAW)

    def reset_peer(self) -> None:
        """Tell a peer that was restored that its connections are gone. The first thing to do."""
        self._carrier_ops.append(Op.RESET)

    def shut(self) -> None:
        """The carrier has ended: no connection is left."""
        for connection in list(self._connections.values()):
            self._forget(connection)
        self._senders.clear()
        self._control.clear()
        self._stray.clear()
        self._carrier_ops.clear()

    # --- what the peer does ---

    def receive(self, packet: Packet) -> Connection | None:
        """Act on a packet; gives the connection whose state may have changed.

        A new one is in its port's :attr:`Listening.backlog`.

        :raises VsockProtocolError: the packet is not for this pair of machines.
        """
        if packet.src_cid != self.peer_cid or packet.dst_cid != self.local_cid:
            raise VsockProtocolError(
                f"a vsock packet from CID {packet.src_cid} to CID {packet.dst_cid}"
            )
        op = packet.op
        if op >= Op.FREEZE:
            if op is not Op.FROZEN or self._voice is not _Voice.FREEZING:
                raise VsockProtocolError(f"an unexpected {op.name} on the carrier")
            self._voice = _Voice.STILL
            if not self._stillness_wanted:
                self.thaw()
            return None
        connection = self._connections.get((packet.dst_port, packet.src_port))
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
            connection.learn_credit(packet.buf_alloc, packet.fwd_cnt)
            if op is Op.RW:
                connection.take_in(packet.payload)
            elif op is Op.SHUTDOWN:
                self._receive_shutdown(connection, packet.flags)
            elif op is Op.CREDIT_REQUEST:
                self._owe(connection, _CREDIT)
        except PeerFault:
            self._reset(connection)
            return connection
        if connection.pending is not None:
            self._enqueue(connection)
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
            self._stray[packet.dst_port, packet.src_port] = None
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
        if flags & Shutdown.NO_RECEIVE:
            connection.peer_ended_receiving = True
        if flags & Shutdown.NO_SEND:
            connection.peer_ended_sending = True
        if connection.peer_ended_sending and (
            connection.peer_ended_receiving or connection.ended_sending
        ):
            self._owe(connection, _RST)
            self._forget(connection)

    def _reset(self, connection: Connection) -> None:
        """End a connection whose peer broke the rules."""
        connection.due = 0
        self._owe(connection, _RST)
        self._forget(connection)
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
        """Too many answers wait to be sent: take no more packets in until some have gone."""
        return len(self._control) + len(self._stray) >= MAX_CONTROL

    @property
    def has_output(self) -> bool:
        """Whether :meth:`pull` would give anything."""
        if self._carrier_ops:
            return True
        return self._voice is _Voice.TALKING and bool(self._control or self._senders or self._stray)

    def pull(self, max_bytes: int) -> list[bytes | memoryview]:
        """The next packets as buffers, header and payload in turn: control first, then data.

        Senders take turns, a packet each. Stops after the packet that reaches ``max_bytes``.
        """
        buffers: list[bytes | memoryview] = []
        for op in self._carrier_ops:
            buffers.append(self._header(0, 0, 0, op, 0, 0, 0))
        self._carrier_ops.clear()
        if self._voice is not _Voice.TALKING:
            return buffers
        while self._stray and len(buffers) < _MAX_BUFFERS:
            local, peer = key = next(iter(self._stray))
            del self._stray[key]
            buffers.append(self._header(local, peer, 0, Op.RST, 0, 0, 0))
        while self._control and len(buffers) < _MAX_BUFFERS:
            self._pull_control(self._control.popleft(), buffers)
        size = 0
        senders = self._senders
        while senders and size < max_bytes and len(buffers) < _MAX_BUFFERS:
            connection = senders.popleft()
            pending = connection.pending
            take = min(connection.credit, self.max_payload)
            if pending is None or not take or connection.state is not State.OPEN:
                connection.queued = False
                continue
            if take < len(pending):
                payload = pending[:take]
                connection.pending = pending[take:]
                senders.append(connection)
            else:
                payload = pending
                take = len(payload)
                connection.pending = None
                connection.queued = False
                self.drained.append(connection)
            if not isinstance(payload.obj, bytes):
                payload = memoryview(bytes(payload))
            connection.spend(take)
            buffers.append(
                self._header(
                    connection.local_port,
                    connection.peer_port,
                    take,
                    Op.RW,
                    0,
                    WINDOW,
                    connection.announce(),
                )
            )
            buffers.append(payload)
            size += take
        return buffers

    def _pull_control(self, connection: Connection, buffers: list[bytes | memoryview]) -> None:
        due = connection.due
        connection.due = 0
        packets: list[tuple[Op, int]] = []
        if due & _REQUEST:
            packets.append((Op.REQUEST, 0))
        if due & _RESPONSE:
            packets.append((Op.RESPONSE, 0))
        if due & _CREDIT:
            packets.append((Op.CREDIT_UPDATE, 0))
        if due & (_NO_RECEIVE | _NO_SEND):
            packets.append((Op.SHUTDOWN, due // _NO_RECEIVE & Shutdown.BOTH))
        if due & _RST:
            packets.append((Op.RST, 0))
        for op, flags in packets:
            buffers.append(
                self._header(
                    connection.local_port,
                    connection.peer_port,
                    0,
                    op,
                    flags,
                    WINDOW,
                    connection.announce(),
                )
            )

    def _header(
        self, local: int, peer: int, length: int, op: Op, flags: int, window: int, forwarded: int
    ) -> bytes:
        return pack_header(
            self.local_cid, self.peer_cid, local, peer, length, op, flags, window, forwarded
        )

    # --- bookkeeping ---

    def _owe(self, connection: Connection, bits: int) -> None:
        if not connection.due:
            self._control.append(connection)
        connection.due |= bits

    def _enqueue(self, connection: Connection) -> None:
        if not connection.queued and connection.credit and connection.state is State.OPEN:
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
