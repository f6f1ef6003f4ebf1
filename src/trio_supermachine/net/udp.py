"""Forwards of datagrams: UDP ports of the host that lead to UDP ports of a guest.

Each client's address is a *flow* of its own, with a connection to the agent and a task that carries
answers back. A flow ends after 60 s without a datagram in either direction, or when it has been
silent for the longest while a 257th client comes. Nothing is queued: a datagram for which the
guest's connection has no room is dropped and counted. Only while the connection is being made are a
few kept, 16 or 64 KiB at most.
"""

from __future__ import annotations

import errno
import socket
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, final

import attrs
import trio

from .._public import NoPublicConstructor, public
from .._util import validators as check
from .._util.trace import trace
from ..agent.client import FrameStream
from ..agent.wire import MAX_DATAGRAM
from .datagrams import DatagramStream
from .serving import CONNECTION_ERRORS, bind, format_address, local_addr

#: Seconds of silence, in both directions, after which a flow ends.
IDLE: Final = 60.0

#: Flows of one forward; of more, the one that has been silent for the longest goes.
MAX_FLOWS: Final = 256

# The datagrams of a client that are kept until the guest is connected.
_EARLY_DATAGRAMS: Final = 16
_EARLY_BYTES: Final = 65536

_RECEIVE: Final = 65536
_PAUSE: Final = 0.1  # seconds, after an error in the place of a datagram


@attrs.define(eq=False)
class _Flow:
    """The flow of one client's datagrams."""

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
        if len(data) > MAX_DATAGRAM:
            return False
        if len(self.early) >= _EARLY_DATAGRAMS or self.early_bytes + len(data) > _EARLY_BYTES:
            return False
        self.early.append(data)
        self.early_bytes += len(data)
        return True

    def connected(self, guest: DatagramStream) -> None:
        self.guest = guest
        while self.early:
            self.send(self.early.popleft())


@final
class UdpServer:
    """The server of a UDP port of the host; :class:`UdpForwarder` is its public view.

    :ivar local_addr: the host's address and port that it listens on.
    :ivar guest_port: the guest's port.
    :ivar dropped: the number of datagrams of clients that were dropped.
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
        self.local_addr: tuple[str, int] = local_addr(sock)
        self.guest_port = guest_port
        self.dropped: int = 0

    def __repr__(self) -> str:
        return f"<UdpForwarder {format_address(*self.local_addr)} to port {self.guest_port}>"

    def cancel(self) -> None:
        """End it, and its flows, soon. Plain and idempotent."""
        self._scope.cancel()
        self._sock.close()

    async def wait_ended(self) -> None:
        """Wait until :meth:`run` has ended."""
        await self._ended.wait()

    async def run(self) -> None:
        """Serve until :meth:`cancel`. Cancelled, it ends in the same way."""
        try:
            with self._scope, suppress(trio.ClosedResourceError):
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
        if self._flows.get(flow.address) is flow:  # it may have had to go
            self._flows.move_to_end(flow.address)

    async def _serve(self, flow: _Flow) -> None:
        try:
            with flow.scope:
                connection = await self._connect(self.guest_port)
                try:
                    guest = DatagramStream(connection.stream)
                    flow.connected(guest)
                    while (datagram := await guest.receive()) is not None:
                        self._touch(flow)
                        await self._answer(datagram, flow.address)
                finally:
                    connection.leave(complete=False)
        except CONNECTION_ERRORS as exc:
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


@public
@final
class UdpForwarder(trio.abc.AsyncResource, metaclass=NoPublicConstructor):
    """A UDP port of the host that leads into a VM: :meth:`Vm.expose_udp`.

    Each client's address has a flow of its own, so that answers find their way. It is there
    until :meth:`aclose`, or the VM's end.

    :ivar local_addr: the host's address and port that it listens on.
    :ivar guest_port: the guest's port.
    """

    _made_by = "Vm.expose_udp"

    def __init__(self, server: UdpServer) -> None:
        self._server = server
        self.local_addr: tuple[str, int] = server.local_addr
        self.guest_port: int = server.guest_port

    def __repr__(self) -> str:
        return repr(self._server)

    @property
    def dropped(self) -> int:
        """The number of datagrams of clients that were dropped, as the guest was slow."""
        return self._server.dropped

    async def aclose(self) -> None:
        """End it, and its flows. Idempotent; done also when cancelled, then a checkpoint."""
        self._server.cancel()
        with trio.CancelScope(shield=True):
            await self._server.wait_ended()
        await trio.lowlevel.checkpoint()


async def open_udp(
    connect: Callable[[int], Awaitable[FrameStream]], host: str, host_port: int, guest_port: int
) -> tuple[UdpServer, UdpForwarder]:
    """Take a UDP port of the host, as :meth:`Vm.expose_udp` does.

    Give the server, which is to be run, and the public view of it.
    """
    check.port("guest_port", guest_port, 1)
    server = UdpServer(await bind(host, host_port, socket.SOCK_DGRAM), connect, guest_port)
    return server, UdpForwarder._create(server)
