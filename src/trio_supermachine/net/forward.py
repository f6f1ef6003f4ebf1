"""Ports of the host that lead to ports of a guest."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Final, final

import trio

from .._util import validators as check
from .._util.public import public
from .relay import relay
from .serving import Server, bind, format_address, local_addr
from .tls import TlsConfig, TlsStream, load_context

#: Connects to a TCP port of the guest; 0 is that of the first listener.
Connect = Callable[[int], Awaitable[trio.abc.HalfCloseableStream]]

#: How many connections a forward has at once, unless it is told.
MAX_CONNECTIONS: Final = 1024


@public
@final
class TcpForwarder(trio.abc.AsyncResource):
    """A TCP port of the host that leads into a VM: :meth:`Vm.expose_tcp`, :meth:`Vm.expose_tls`.

    It is there until :meth:`stop`, :meth:`aclose`, or the VM's end.

    :ivar local_addr: the host's address and port that it listens on.
    :ivar guest_port: where it leads to; 0 is the guest's first listener.
    """

    def __init__(
        self,
        sock: trio.socket.SocketType,
        handle: Callable[[trio.SocketStream], Awaitable[object]],
        guest_port: int,
        limit: int,
    ) -> None:
        self._server = Server(trio.SocketListener(sock), handle, limit)
        self.local_addr = local_addr(sock)
        self.guest_port = guest_port

    def __repr__(self) -> str:
        return f"<TcpForwarder {format_address(*self.local_addr)} to port {self.guest_port}>"

    async def stop(self) -> None:
        """Accept no more connections, and wait for the end of those in flight. Idempotent.

        Cancelled, it leaves those in flight as they are; nothing is accepted all the same.
        """
        self._server.stop()
        await self._server.wait_ended()

    async def aclose(self) -> None:
        """Accept no more connections, and reset those in flight. Idempotent.

        The work is done also when cancelled; then this is a checkpoint.
        """
        self.cancel()
        with trio.CancelScope(shield=True):
            await self._server.wait_ended()
        await trio.lowlevel.checkpoint()

    def cancel(self) -> None:
        """Accept no more connections, and reset those in flight, soon. Plain and idempotent."""
        self._server.cancel()

    async def run(self) -> None:
        """Serve until one of those. Cancelled, it ends as by :meth:`cancel`."""
        await self._server.run()


async def open_tcp(
    connect: Connect,
    host: str,
    host_port: int,
    guest_port: int,
    limit: int = MAX_CONNECTIONS,
) -> TcpForwarder:
    """Take a TCP port of the host, for :meth:`TcpForwarder.run`. As :meth:`Vm.expose_tcp`."""
    check.port("guest_port", guest_port)
    check.integer("max_connections", limit, 1)
    sock = await bind(host, host_port, socket.SOCK_STREAM)

    async def handle(client: trio.SocketStream) -> None:
        await relay(client, await connect(guest_port))

    return TcpForwarder(sock, handle, guest_port, limit)


async def open_tls(
    connect: Connect, config: TlsConfig, limit: int = MAX_CONNECTIONS
) -> TcpForwarder:
    """The same with TLS towards the client. As :meth:`Vm.expose_tls`."""
    check.integer("max_connections", limit, 1)
    context = await load_context(config)
    sock = await bind(*config.listen_addr, socket.SOCK_STREAM)

    async def handle(client: trio.SocketStream) -> None:
        stream = TlsStream(client, context)
        await stream.shake_hands()
        await relay(stream, await connect(config.guest_port))

    return TcpForwarder(sock, handle, config.guest_port, limit)
