"""Ports of the host that lead to ports of a guest."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import final

import trio

from ..trace import trace
from .relay import relay
from .serving import Server, bind, check_port, format_address, local_addr
from .tls import TlsConfig, TlsStream, load_context

#: Connects to a TCP port of the guest; 0 is that of the first listener.
Connect = Callable[[int], Awaitable[trio.abc.HalfCloseableStream]]

#: How many connections a forward has at once, unless it is told.
MAX_CONNECTIONS = 1024


@final
class TcpForwarder(trio.abc.AsyncResource):
    """A TCP port of the host that leads into a VM: :meth:`Vm.expose_tcp`, :meth:`Vm.expose_tls`.

    It is there until :meth:`stop`, :meth:`aclose`, or the VM's end.

    :ivar local_addr: the host's address and port that it listens on.
    :ivar guest_port: where it leads to; 0 is the guest's first listener.
    """

    def __init__(self, server: Server, local_addr: tuple[str, int], guest_port: int) -> None:
        self._server = server
        self.local_addr = local_addr
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
        self._server.cancel()
        with trio.CancelScope(shield=True):
            await self._server.wait_ended()
        await trio.lowlevel.checkpoint()


async def open_tcp(
    nursery: trio.Nursery,
    connect: Connect,
    host: str,
    host_port: int,
    guest_port: int,
    limit: int = MAX_CONNECTIONS,
) -> TcpForwarder:
    """Forward a TCP port, with tasks in ``nursery``. Raises as :meth:`Vm.expose_tcp`."""
    check_port("guest_port", guest_port)
    sock = await bind(host, host_port, socket.SOCK_STREAM)

    async def handle(client: trio.SocketStream) -> None:
        await relay(client, await connect(guest_port))

    return _start(nursery, sock, handle, guest_port, limit)


async def open_tls(
    nursery: trio.Nursery, connect: Connect, config: TlsConfig, limit: int = MAX_CONNECTIONS
) -> TcpForwarder:
    """The same with TLS towards the client. Raises as :meth:`Vm.expose_tls`."""
    context = await load_context(config)
    sock = await bind(*config.listen_addr, socket.SOCK_STREAM)

    async def handle(client: trio.SocketStream) -> None:
        stream = TlsStream(client, context)
        await stream.shake_hands()
        await relay(stream, await connect(config.guest_port))

    return _start(nursery, sock, handle, config.guest_port, limit)


def _start(
    nursery: trio.Nursery,
    sock: trio.socket.SocketType,
    handle: Callable[[trio.SocketStream], Awaitable[None]],
    guest_port: int,
    limit: int,
) -> TcpForwarder:
    server = Server(trio.SocketListener(sock), handle, limit)
    forwarder = TcpForwarder(server, local_addr(sock), guest_port)
    nursery.start_soon(server.run, name=repr(forwarder))
    trace("net", "%r", forwarder)
    return forwarder
