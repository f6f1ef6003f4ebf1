"""Streams and listeners over a carrier of vsock packets: the I/O around :class:`.Mux`.

Theory of operation. :class:`VsockMux` joins three things: the state of all connections
(:class:`.Mux`), the carrier that moves packets, and the tasks that use streams.

- A call of a user changes the state and then flushes the carrier, so that most packets leave in the
  very call that makes them. Only what the carrier does not take at once is left to its own task.
- The carrier's task puts packets into the state and says which connection each has touched; that
  wakes the stream's waiting task or calls its watcher.
- Each stream has one place for a sender and one for a receiver (:class:`.Parking`). A woken task
  looks at the state again, so a wake too many does no harm.

*Backpressure.* A stream offers the muxer one piece of data at a time and waits until all of it is
packed. That happens as the peer's credit, the other senders and the carrier allow. What is
received is buffered up to the connection's window, whose credit returns as it is read.

*The end* of the carrier breaks all streams at once. What they have received can still be read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import final

import trio

from .._util.conflict import OneAtATime
from .carrier import Carrier
from .connection import Connection, State
from .muxer import Listening, Mux
from .packet import GUEST_CID, HOST_CID, MAX_PAYLOAD, VsockProtocolError
from .parking import Parking


@final
class VsockStream(trio.abc.HalfCloseableStream):
    """One connection. :meth:`VsockMux.dial` and :meth:`VsockListener.accept` make them.

    When the carrier ends, sending raises :exc:`trio.BrokenResourceError` at once, and receiving
    does when all that has been received is read.
    """

    def __init__(self, mux: VsockMux, connection: Connection) -> None:
        self._mux = mux
        self._connection = connection
        self._closed = False
        self._sending = OneAtATime("another task is sending on this stream")
        self._receiving = OneAtATime("another task is receiving on this stream")
        self._sender = Parking()
        self._receiver = Parking()
        self._awaits_answer = connection.state is State.DIALING
        self._watcher: Callable[[], None] | None = None
        self._room_wanted = False

    def __repr__(self) -> str:
        connection = self._connection
        state = "closed" if self._closed else connection.state.value
        return f"<VsockStream {connection.local_port}:{connection.peer_port} {state}>"

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data``; wait while the peer has no room for it.

        Returns when the data is on its way, not when the peer has read it. A cancelled call
        has sent an unknown part.

        :raises trio.BrokenResourceError: the peer does not receive any more.
        :raises trio.ClosedResourceError: closed here, or :meth:`send_eof` was called.
        :raises trio.BusyResourceError: another task is sending.
        """
        with self._sending:
            self._check_sending()
            await trio.lowlevel.checkpoint_if_cancelled()
            if data:
                connection = self._connection
                while connection.pending is not None:  # of `dial` or `send_nowait`
                    await self._sender.park()
                    self._check_sending()
                self._mux._offer(connection, memoryview(data).cast("B"))
                if connection.pending is not None:
                    await self._wait_sent()
                    return
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def _wait_sent(self) -> None:
        connection = self._connection
        try:
            while connection.pending is not None:
                await self._sender.park()
                self._check_sending()
        finally:
            self._mux.core.withdraw(connection)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the peer has room. Raises what :meth:`send_all` does."""
        with self._sending:
            self._check_sending()
            await trio.lowlevel.checkpoint()
            while not self._connection.credit:
                self._check_sending()
                await self._sender.park()
            self._check_sending()

    async def send_eof(self) -> None:
        """Tell the peer that no more data comes; receiving goes on. Idempotent.

        A cancelled call may have told it or not. Raises what :meth:`send_all` does.
        """
        with self._sending:
            if self._closed:
                raise trio.ClosedResourceError("this stream is closed")
            await trio.lowlevel.checkpoint()
            connection = self._connection
            if connection.ended_sending and not self._closed:
                return
            self._check_sending()
            self._mux.core.end_sending(connection)
            self._mux._carrier.flush()

    def _check_sending(self) -> None:
        connection = self._connection
        if self._closed:
            raise trio.ClosedResourceError("this stream is closed")
        if connection.ended_sending:
            raise trio.ClosedResourceError("send_eof was called on this stream")
        if connection.peer_ended_receiving or connection.state is State.GONE:
            raise trio.BrokenResourceError(self._mux._reason or "the peer has left")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for data and take at most ``max_bytes``; empty when the peer has ended sending.

        A cancelled call takes nothing out.

        :raises trio.BrokenResourceError: the connection was reset, or the carrier has ended.
        :raises trio.ClosedResourceError: closed here.
        :raises trio.BusyResourceError: another task is receiving.
        """
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receiving:
            connection = self._connection
            parked = False
            while True:
                if self._closed:
                    raise trio.ClosedResourceError("this stream is closed")
                if connection.buffered:
                    if parked:
                        break
                    await trio.lowlevel.checkpoint()
                    parked = True
                elif connection.peer_ended_sending:
                    if not parked:
                        await trio.lowlevel.checkpoint()
                    return b""
                elif connection.state is State.GONE:
                    raise trio.BrokenResourceError(
                        self._mux._reason or "the peer reset the connection"
                    )
                else:
                    await self._receiver.park()
                    parked = True
            return self._mux._read(connection, max_bytes)

    # --- without a task ---

    def watch(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` whenever :meth:`take` may give data or :attr:`ended` may be true.

        That is right away if it is so already, and not any more once the stream is closed. The task
        that moves the packets calls it, so it must be short and must not raise.
        """
        self._watcher = changed
        self._touched()

    def take(self) -> bytes:
        """Take received data, or part of it; empty if there is none now."""
        connection = self._connection
        return self._mux._read(connection, None) if connection.buffered else b""

    @property
    def ended(self) -> bool:
        """Whether no more data comes behind what :meth:`take` gives."""
        connection = self._connection
        return self._closed or connection.peer_ended_sending or connection.state is State.GONE

    def sendable(self) -> bool:
        """Tell whether :meth:`send_nowait` takes data; if not, call the watcher when it does."""
        connection = self._connection
        self._room_wanted = connection.pending is not None
        return not (
            self._room_wanted
            or self._closed
            or connection.ended_sending
            or connection.peer_ended_receiving
            or connection.state is State.GONE
        )

    def send_nowait(self, data: bytes) -> None:
        """Send ``data`` as the peer makes room, without a wait.

        :raises trio.WouldBlock: not :meth:`sendable`.
        """
        if not self.sendable():
            raise trio.WouldBlock
        self._mux._offer(self._connection, memoryview(data))

    def when_gone(self, call: Callable[[], None]) -> None:
        """Call ``call`` when the connection is gone; it becomes the watcher of :meth:`watch`.

        Behind the end of data a user would not hear of a reset otherwise.
        """

        def changed() -> None:
            if self._connection.state is State.GONE:
                call()

        self.watch(changed)

    def end_like_tcp(self) -> None:
        """Let this end as TCP's connections do. The peer must do the same. Plain.

        A peer that closes without having ended sending has reset the connection: Linux's AF_VSOCK
        has no other way to say so. Receiving then raises :exc:`trio.BrokenResourceError` behind
        what came before. :meth:`aclose` tells the peer only that nothing more is sent; the peer
        ends in its own time, and what it sends until then resets the connection.
        """
        self._connection.like_tcp = True

    async def aclose(self) -> None:
        """Leave. Data that was sent still reaches the peer; data not yet read is lost.

        A checkpoint, behind the work: a cancelled call has closed the stream, too.
        """
        if not self._closed:
            self._closed = True
            self._mux.core.close(self._connection)
            self._left()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Leave by a reset: data that the peer has not read may be lost. Plain."""
        if not self._closed:
            self._closed = True
            self._mux.core.abort(self._connection)
            self._left()

    def leave(self) -> None:
        """Leave a peer that has said all and is about to close. Plain.

        This sends nothing: the peer's own end is answered as it comes.
        """
        if not self._closed:
            self._closed = True
            self._mux.core.close(self._connection, telling=False)
            self._left()

    def _left(self) -> None:
        self._watcher = None
        self._mux._streams.pop(self._connection, None)
        self._wake()
        if self._mux.core.has_output:
            self._mux._carrier.flush()

    def _wake(self) -> None:
        self._sender.wake()
        self._receiver.wake()
        if self._watcher is not None:
            self._watcher()

    def _touched(self) -> None:
        """Wake whoever waits for a change of the connection's state, which there may have been."""
        connection = self._connection
        if connection.state is State.GONE or connection.peer_ended_receiving:
            self._wake()
            return
        if connection.buffered or connection.peer_ended_sending or self._awaits_answer:
            self._receiver.wake()
            if self._watcher is not None:
                self._watcher()
        if connection.credit and connection.pending is None:
            self._sender.wake()

    def _drained(self) -> None:
        """Wake the sender, as what it offered has gone."""
        self._sender.wake()
        if self._room_wanted and self._watcher is not None:
            self._room_wanted = False
            self._watcher()


@final
class VsockListener(trio.abc.Listener[VsockStream]):
    """Acceptor of the peer's dials to one port. :meth:`VsockMux.listen` makes them."""

    def __init__(self, mux: VsockMux, listening: Listening) -> None:
        self._mux = mux
        self._listening = listening
        self._closed = False
        self._waiters = trio.lowlevel.ParkingLot()

    async def accept(self) -> VsockStream:
        """Wait for a connection; any number of tasks may. A cancelled call takes none.

        :raises trio.BrokenResourceError: the carrier has ended; or the error of `VsockMux.close`.
        :raises trio.ClosedResourceError: closed here.
        """
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise trio.ClosedResourceError("this listener is closed")
            self._mux.check_alive()
            if self._listening.backlog:
                return self._mux._adopt(self._listening.backlog.popleft())
            await self._waiters.park()

    async def aclose(self) -> None:
        """Refuse dials from now on, and reset those not accepted. Accepted streams live on."""
        if not self._closed:
            self._closed = True
            self._mux._unlisten(self)
        await trio.lowlevel.checkpoint()


@final
class VsockMux:
    """All vsock connections of one machine, over one carrier that it owns.

    Packets move while :meth:`run` runs; some may leave before.

    :param max_payload: bytes that a packet to the peer may have.
    """

    def __init__(
        self,
        carrier: Carrier,
        *,
        local_cid: int = HOST_CID,
        peer_cid: int = GUEST_CID,
        max_payload: int = MAX_PAYLOAD,
    ) -> None:
        #: The connections. Its carrier uses them, too: see :class:`~.carrier.Packets`.
        self.core: Mux = Mux(local_cid=local_cid, peer_cid=peer_cid, max_payload=max_payload)
        self._carrier = carrier
        self._streams: dict[Connection, VsockStream] = {}
        self._listeners: dict[int, VsockListener] = {}
        self._scope = trio.CancelScope()
        self._reason: str | None = None
        self._error: Callable[[], BaseException] | None = None
        carrier.attach(self)

    async def run(self) -> None:
        """Move packets until the carrier ends, :meth:`close` is called, or this is cancelled.

        However it ends, the carrier is closed and every stream is broken. Call it once.

        :raises VsockProtocolError: the peer sent nonsense.
        """
        if self._reason is not None:
            await trio.lowlevel.checkpoint()
            return
        self._carrier.flush()
        try:
            with self._scope:
                await self._carrier.serve()
        except VsockProtocolError as exc:
            self.end(str(exc))
            raise
        finally:
            self.end("the machine's channel has ended")

    async def dial(self, port: int, opening: bytes = b"") -> VsockStream:
        """Connect to the peer's ``port`` and wait for its answer. Cancelled, give the attempt up.

        :param opening: bytes that follow the request at once, without a wait for the answer. A
            refusal breaks the stream. Closing the stream before the answer gives the attempt up.
        :raises ConnectionRefusedError: nothing listens there.
        :raises trio.BrokenResourceError: the carrier has ended; or the error of :meth:`close`.
        :raises OSError: (``EMFILE``) too many connections.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self.check_alive()
            connection = self.core.dial(port)
        except BaseException:
            await trio.lowlevel.cancel_shielded_checkpoint()
            raise
        stream = self._adopt(connection)
        if opening:
            stream._awaits_answer = False
            self._offer(connection, memoryview(opening))
            return stream
        self._carrier.flush()
        try:
            while connection.state is State.DIALING:
                await stream._receiver.park()
        except BaseException:
            stream.abort()
            raise
        stream._awaits_answer = False
        self.check_alive()
        if connection.state is State.GONE and not connection.peer_ended_sending:
            stream.abort()
            raise ConnectionRefusedError(f"nothing listens on vsock port {port}")
        return stream

    def listen(self, port: int, backlog: int = 1024) -> VsockListener:
        """Accept connections to ``port`` from now on.

        :param backlog: connections that may wait to be accepted; beyond, they are refused.

        :raises OSError: (``EADDRINUSE``) the port has a listener.
        """
        listening = self.core.listen(port, backlog)
        listener = self._listeners[port] = VsockListener(self, listening)
        return listener

    def quiet(self) -> AbstractAsyncContextManager[None]:
        """Hold all packets back for a block: see :meth:`.Carrier.quiet`."""
        return self._carrier.quiet()

    def reset_peer(self) -> None:
        """Tell a restored peer that its connections are gone. Before :meth:`run`, or never."""
        self._carrier.reset_peer()

    def close(self, error: Callable[[], BaseException] | None = None) -> None:
        """End everything now; :meth:`run` returns. Plain and idempotent.

        :param error: makes the exception that dials and accepts raise from now on, in the place of
            :exc:`trio.BrokenResourceError`.
        """
        if error is not None:
            self._error = error
        self.end("the machine's channel was closed")

    # --- for streams and listeners ---

    def check_alive(self) -> None:
        """Raise what dials and accepts raise once the carrier has ended; do nothing before."""
        if self._reason is not None:
            raise trio.BrokenResourceError(self._reason) if self._error is None else self._error()

    def _adopt(self, connection: Connection) -> VsockStream:
        stream = VsockStream(self, connection)
        if connection.state is not State.GONE:
            self._streams[connection] = stream
        return stream

    def _unlisten(self, listener: VsockListener) -> None:
        listening = listener._listening
        if self._listeners.get(listening.port) is listener:
            del self._listeners[listening.port]
        self.core.unlisten(listening)
        listener._waiters.unpark_all()
        self._carrier.flush()

    def _offer(self, connection: Connection, data: memoryview) -> None:
        self.core.offer(connection, data)
        self._carrier.flush()

    def _read(self, connection: Connection, max_bytes: int | None) -> bytes:
        data = self.core.read(connection, max_bytes)
        if connection.due:
            self._carrier.flush()
        return data

    # --- for the carrier ---

    def touched(self, connection: Connection) -> None:
        stream = self._streams.get(connection)
        if stream is not None:
            stream._touched()
            if connection.state is State.GONE:
                self._streams.pop(connection, None)  # unless a watcher has left the stream
            return
        listener = self._listeners.get(connection.local_port)
        if listener is not None and listener._listening.backlog:
            listener._waiters.unpark()

    def pulled(self) -> None:
        drained = self.core.drained
        while drained:  # which watchers that send more make longer
            stream = self._streams.get(drained.pop())
            if stream is not None:
                stream._drained()

    def end(self, reason: str) -> None:
        if self._reason is not None:
            return
        self._reason = reason
        self.core.shut()
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream._wake()
        for listener in self._listeners.values():
            listener._waiters.unpark_all()
        self._scope.cancel()
        self._carrier.close()
