"""Servers of host ports and unix sockets: a task for each connection, up to a limit."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Final, final

import trio

from .._util import validators as check
from .._util.trace import trace
from ..errors import ConfigError, SupermachineError
from .relay import reset

#: Seconds until the next try, where the host has no descriptor or memory for a connection.
_PAUSE: Final = 0.1

#: Errors that end one connection and nothing more.
CONNECTION_ERRORS: Final = (
    OSError,
    SupermachineError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)


@final
class Server:
    """A server of stream connections.

    A connection that is still open when ``handle`` returns is reset.

    :param listener: accepts the connections; the server closes it.
    :param handle: an async function that is called with each connection.
    :param limit: the number of connections at once; others wait in the listener's backlog.
    """

    def __init__(
        self,
        listener: trio.SocketListener,
        handle: Callable[[trio.SocketStream], Awaitable[object]],
        limit: int,
    ) -> None:
        self._listener = listener
        self._handle = handle
        self._room = trio.Semaphore(limit)
        self._accepting = trio.CancelScope()
        self._everything = trio.CancelScope()
        self._ended = trio.Event()

    async def run(self) -> None:
        """Serve until :meth:`stop`, and then until the last connection ends, or :meth:`cancel`.

        Cancelled, it leaves nothing open either.
        """
        try:
            with self._everything:
                async with trio.open_nursery() as nursery:
                    with self._accepting:
                        await self._accept(nursery)
        finally:
            self._listener.socket.close()
            self._ended.set()

    def stop(self) -> None:
        """Accept no more. Plain and idempotent."""
        self._accepting.cancel()
        self._listener.socket.close()

    def cancel(self) -> None:
        """Accept no more, and end what was accepted. Plain and idempotent."""
        self.stop()
        self._everything.cancel()

    async def wait_ended(self) -> None:
        """Wait until :meth:`run` has ended."""
        await self._ended.wait()

    async def _accept(self, nursery: trio.Nursery) -> None:
        while True:
            await self._room.acquire()
            while True:
                try:
                    stream = await self._listener.accept()
                    break
                except trio.ClosedResourceError:
                    return
                except OSError as exc:
                    # One that was gone before it was accepted, or no room in this process.
                    trace("net", "accept: %s", exc)
                    await trio.sleep(_PAUSE)
            nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            await self._handle(stream)
        except CONNECTION_ERRORS as exc:
            trace("net", "a connection ended: %s", exc)
        finally:
            self._room.release()
            with trio.CancelScope(shield=True):  # nothing in it waits
                await reset(stream)


async def bind(host: str, port: int, kind: socket.SocketKind) -> trio.socket.SocketType:
    """Make a socket with this address of the host; port 0 is a free one.

    :param host: an address, or a name, of which the first address counts.
    :raises OSError: it cannot be had (``EADDRINUSE`` and so on); the message names the address.
    """
    check.port("the host's port", port)
    if not isinstance(host, str) or not host or not host.isascii() or "\0" in host:
        raise ConfigError(f"the host's address must be an IP address or a name, not {host!r}")
    try:
        found = await trio.socket.getaddrinfo(host, port, type=kind)
    except (socket.gaierror, UnicodeError) as exc:  # a label that is empty, or too long
        why = exc.strerror if isinstance(exc, OSError) else "no name of a host"
        raise ConfigError(f"{host!r} is no address of this host: {why}") from exc
    family, _, protocol, _, address = found[0]
    sock = trio.socket.socket(family, kind, protocol)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen(socket.SOMAXCONN)
    except OSError as exc:
        sock.close()
        why = "the port is taken" if exc.errno == errno.EADDRINUSE else exc.strerror
        raise OSError(exc.errno, f"cannot listen on {format_address(host, port)}: {why}") from exc
    except BaseException:
        sock.close()
        raise
    return sock


def local_addr(sock: trio.socket.SocketType) -> tuple[str, int]:
    """Give the address and the port that a socket is bound to."""
    address = sock.getsockname()
    return str(address[0]), int(address[1])


def format_address(host: str, port: int) -> str:
    """Write an address and a port as people do."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
