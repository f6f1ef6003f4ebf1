"""Forwards: TCP ports of the host that lead to ports of a guest."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, final

import trio

from .._public import NoPublicConstructor, public
from .._util import validators as check
from .relay import relay
from .serving import Server, bind, format_address, local_addr

if TYPE_CHECKING:
    from .tls import TlsConfig

#: A function that connects to a TCP port of the guest; 0 is that of the first listener.
Connect = Callable[[int], Awaitable[trio.abc.HalfCloseableStream]]

#: The default of the connections that a forward has at once.
MAX_CONNECTIONS: Final = 1024


@public
@final
class TcpForwarder(trio.abc.AsyncResource, metaclass=NoPublicConstructor):
    """A TCP port of the host that leads into a VM: :meth:`Vm.expose_tcp`, :meth:`Vm.expose_tls`.

    It is there until :meth:`stop`, :meth:`aclose`, or the VM's end.

    :ivar local_addr: the host's address and port that it listens on.
    :ivar guest_port: the guest's port; 0 is that of the first listener.

    Example::

        forward = await vm.expose_tcp(0, 8080)
        print("http://{}:{}/".format(*forward.local_addr))
    """

    _made_by = "Vm.expose_tcp"

    def __init__(self, server: Server, listens_on: tuple[str, int], guest_port: int) -> None:
        self._server = server
        self.local_addr: tuple[str, int] = listens_on
        self.guest_port: int = guest_port

    def __repr__(self) -> str:
        target = f"port {self.guest_port}" if self.guest_port else "the first listener"
        return f"<TcpForwarder {format_address(*self.local_addr)} to {target}>"

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
    connect: Connect,
    host: str,
    host_port: int,
    guest_port: int,
    limit: int = MAX_CONNECTIONS,
) -> tuple[Server, TcpForwarder]:
    """Take a TCP port of the host, as :meth:`Vm.expose_tcp` does.

    Give the server, which is to be run, and the public view of it.
    """
    check.port("guest_port", guest_port)
    check.integer("max_connections", limit, 1)
    sock = await bind(host, host_port, socket.SOCK_STREAM)

    async def handle(client: trio.SocketStream) -> None:
        await relay(client, await connect(guest_port))

    return _forward(sock, handle, guest_port, limit)


async def open_tls(
    connect: Connect, config: TlsConfig, limit: int = MAX_CONNECTIONS
) -> tuple[Server, TcpForwarder]:
    """Take a TCP port of the host, with TLS towards the client, as :meth:`Vm.expose_tls` does."""
    from .tls import TlsStream, load_context  # few VMs have such a forward

    check.integer("max_connections", limit, 1)
    context = await load_context(config)
    sock = await bind(*config.listen_addr, socket.SOCK_STREAM)

    async def handle(client: trio.SocketStream) -> None:
        stream = TlsStream(client, context)
        await stream.shake_hands()
        await relay(stream, await connect(config.guest_port))

    return _forward(sock, handle, config.guest_port, limit)


def _forward(
    sock: trio.socket.SocketType,
    handle: Callable[[trio.SocketStream], Awaitable[object]],
    guest_port: int,
    limit: int,
) -> tuple[Server, TcpForwarder]:
    server = Server(trio.SocketListener(sock), handle, limit)
    return server, TcpForwarder._create(server, local_addr(sock), guest_port)
