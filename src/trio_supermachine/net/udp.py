"""UDP ports of the host that lead to UDP ports of a guest."""

from __future__ import annotations

import errno
import struct
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, final

import attrs
import trio

from ..agent.client import FrameStream
from ..agent.wire import FrameType, WireError
from ..devices.vsock.stream import VsockStream
from ..trace import trace
from .serving import CONNECTION_ERRORS, format_address, local_addr

#: The largest payload of a UDP datagram over IPv4.
MAX_DATAGRAM: Final = 65507

#: Seconds of silence, in both directions, after which a flow ends.
IDLE: Final = 60.0

#: Flows of one forward; of more, the one that has been silent for the longest goes.
MAX_FLOWS: Final = 256

# What a client may send before the guest is connected.
_EARLY_DATAGRAMS: Final = 16
_EARLY_BYTES: Final = 65536

_RECEIVE: Final = 65536
_PAUSE: Final = 0.1  # seconds, where the host has no memory for a datagram
_HEADER: Final = struct.Struct("<IBBH")


class DatagramDecoder:
    """DATA frames in any chunking in, datagrams out, whole ones, unlike :class:`FrameDecoder`.

    At most a datagram is held beyond what was fed.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

    def next(self) -> bytes | None:
        """The next whole datagram. :raises WireError: something else than a datagram comes."""
        buffer = self._buffer
        if len(buffer) < _HEADER.size:
            return None
        length, type_, stream, zero = _HEADER.unpack_from(buffer)
        if type_ != FrameType.DATA or length > MAX_DATAGRAM or stream or zero:
            raise WireError(f"no datagram: frame {type_} of {length} bytes")
        end = _HEADER.size + length
        if len(buffer) < end:
            return None
        datagram = bytes(buffer[_HEADER.size : end])
        del buffer[:end]
        return datagram


def encode_datagram(data: bytes) -> bytes:
    """A datagram as a frame."""
    return _HEADER.pack(len(data), FrameType.DATA, 0, 0) + data


@final
class DatagramStream:
    """Datagrams over a connection to the guest that has been made for them."""

    def __init__(self, stream: VsockStream) -> None:
        self._stream = stream
        self._decoder = DatagramDecoder()

    def send_nowait(self, data: bytes) -> bool:
        """Send a datagram; false if there is no room for it, and it is dropped."""
        if len(data) > MAX_DATAGRAM or not self._stream.sendable():
            return False
        self._stream.send_nowait(encode_datagram(data))
        return True

    async def receive(self) -> bytes | None:
        """The next datagram, or ``None`` at the end. A cancellation loses nothing.

        :raises WireError: the guest broke the protocol.
        :raises trio.BrokenResourceError: the connection was reset.
        """
        while (datagram := self._decoder.next()) is None:
            data = await self._stream.receive_some(_RECEIVE)
            if not data:
                return None
            self._decoder.feed(data)
        return datagram

    def abort(self) -> None:
        """End the flow. Plain and idempotent."""
        self._stream.abort()


@attrs.define(eq=False)
class _Flow:
    """What one client says to the guest, and hears from it."""

    address: Any
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    guest: DatagramStream | None = None
    early: deque[bytes] = attrs.field(factory=deque)
    early_bytes: int = 0

    def touch(self) -> None:
        self.scope.deadline = trio.current_time() + IDLE

    def send(self, data: bytes) -> bool:
        if self.guest is not None:
            return self.guest.send_nowait(data)
        if len(self.early) >= _EARLY_DATAGRAMS or self.early_bytes + len(data) > _EARLY_BYTES:
            return False
        self.early.append(data)
        self.early_bytes += len(data)
        return True

    def connected(self, guest: DatagramStream) -> None:
        self.guest = guest
        while self.early:
            guest.send_nowait(self.early.popleft())


@final
class UdpForwarder(trio.abc.AsyncResource):
    """A UDP port of the host that leads into a VM: :meth:`Vm.expose_udp`.

    Each client's address is a flow of its own, so that answers find their way. It is there
    until :meth:`aclose`, or the VM's end.

    :ivar local_addr: the host's address and port that it listens on.
    :ivar guest_port: where it leads to.
    :ivar dropped: datagrams of clients that found no room, as the guest was slow.
    """

    def __init__(
        self,
        sock: trio.socket.SocketType,
        connect: Callable[[int], Awaitable[FrameStream]],
        guest_port: int,
    ) -> None:
        self._sock = sock
        self._connect = connect
        self._flows: OrderedDict[Any, _Flow] = OrderedDict()
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self.local_addr = local_addr(sock)
        self.guest_port = guest_port
        self.dropped = 0

    def __repr__(self) -> str:
        return f"<UdpForwarder {format_address(*self.local_addr)} to port {self.guest_port}>"

    async def aclose(self) -> None:
        """End it, and its flows. Idempotent; done also when cancelled, then a checkpoint."""
        self.cancel()
        with trio.CancelScope(shield=True):
            await self._ended.wait()
        await trio.lowlevel.checkpoint()

    def cancel(self) -> None:
        """End it, and its flows. Plain and idempotent."""
        self._scope.cancel()

    async def run(self) -> None:
        """Serve until :meth:`cancel`. Cancelled, it does the same."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    while True:
                        await self._take(nursery)
        finally:
            self._sock.close()
            self._ended.set()

    async def _take(self, nursery: trio.Nursery) -> None:
        try:
            data, address = await self._sock.recvfrom(_RECEIVE)
        except OSError as exc:
            trace("net", "%r: %s", self, exc)
            await trio.sleep(_PAUSE)
            return
        flow = self._flows.get(address)
        if flow is None:
            if len(self._flows) >= MAX_FLOWS:
                self._flows.popitem(last=False)[1].scope.cancel()
            flow = self._flows[address] = _Flow(address)
            nursery.start_soon(self._serve, flow)
        self._touch(flow)
        if not flow.send(data):
            self.dropped += 1

    def _touch(self, flow: _Flow) -> None:
        flow.touch()
        if self._flows.get(flow.address) is flow:  # not one that had to go
            self._flows.move_to_end(flow.address)

    async def _serve(self, flow: _Flow) -> None:
        try:
            with flow.scope:
                connection = await self._connect(self.guest_port)
                guest = DatagramStream(connection.stream)
                try:
                    flow.connected(guest)
                    while (data := await guest.receive()) is not None:
                        self._touch(flow)
                        await self._answer(data, flow.address)
                finally:
                    guest.abort()
        except (*CONNECTION_ERRORS, WireError) as exc:
            trace("net", "%r: a flow ended: %s", self, exc)
        finally:
            if self._flows.get(flow.address) is flow:
                del self._flows[flow.address]

    async def _answer(self, data: bytes, address: Any) -> None:
        try:
            await self._sock.sendto(data, address)
        except OSError as exc:
            if exc.errno == errno.EBADF:
                raise
            trace("net", "%r: an answer was dropped: %s", self, exc)
