"""Unix sockets on the host that lead into a guest, for other programs of the same user."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import struct
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._util import validators as check
from .._util.trace import trace
from .._util.validators import MAX_PORT
from .forward import Connect
from .relay import relay
from .serving import Server

#: The first 16 bytes of a routing header; the guest's port follows, as a big-endian u32.
MAGIC: Final = b"SMUX-PORT-V1".ljust(16, b"\0")
_PORT: Final = struct.Struct(">I")
_HEADER_SIZE: Final = len(MAGIC) + _PORT.size

#: Seconds of silence from the start after which there is no header.
SILENCE: Final = 0.02
#: Seconds for a header that has begun.
PATIENCE: Final = 5.0

#: Connections that each socket has at once.
MAX_CONNECTIONS: Final = 1024

_MODE: Final = stat.S_IRUSR | stat.S_IWUSR

_RECEIVE: Final = 65536


@attrs.frozen
class Route:
    """The destination of a connection.

    :ivar port: a TCP port of the guest; 0 is that of the first listener.
    :ivar rest: bytes that came behind the header, or in the place of one.
    """

    port: int
    rest: bytes


class HeaderSniffer:
    """A decoder of the :class:`Route` of a new connection, from bytes in any chunking."""

    def __init__(self) -> None:
        self._seen = b""

    @property
    def begun(self) -> bool:
        """Whether bytes have come that may become a header."""
        return bool(self._seen)

    def feed(self, data: bytes | bytearray) -> Route | None:
        """Add what was received, and return the route; ``None`` until it is known.

        :raises ValueError: the header names no TCP port.
        """
        self._seen += data
        seen = self._seen
        if not MAGIC.startswith(seen[: len(MAGIC)]):
            return Route(0, seen)
        if len(seen) < _HEADER_SIZE:
            return None
        (port,) = _PORT.unpack_from(seen, len(MAGIC))
        if port > MAX_PORT:
            raise ValueError(f"{port} is no TCP port")
        return Route(port, seen[_HEADER_SIZE:])

    def end(self) -> Route:
        """Return the route of a connection that ended, or fell silent, before a whole header."""
        return Route(0, self._seen)


async def sniff(stream: trio.abc.ReceiveStream) -> Route | None:
    """Find out where a new connection goes; ``None`` if it begins a header and says no more.

    :raises ValueError: the header names no TCP port.
    """
    sniffer = HeaderSniffer()
    begin = trio.current_time()
    with trio.move_on_at(begin + SILENCE) as scope:
        while True:
            data = await stream.receive_some(_RECEIVE)
            route = sniffer.feed(data) if data else sniffer.end()
            if route is not None:
                return route
            scope.deadline = begin + PATIENCE
    return None if sniffer.begun else sniffer.end()


@final
class UnixSockets:
    """The two unix sockets of a VM, which :meth:`run` serves and removes.

    They are there when this is made, with mode 0600 from the first moment.

    :param directory: their place, which is made if it is missing; ``None`` is a private one.
    :param connect: connects to a TCP port of the guest.
    :param dial: connects to the guest's agent.
    :ivar vsock_path: leads to TCP ports; see :class:`HeaderSniffer`.
    :ivar exec_path: leads to the agent, byte by byte.
    :raises OSError: they cannot be made.
    """

    def __init__(
        self,
        directory: Path | None,
        connect: Connect,
        dial: Callable[[], Awaitable[trio.abc.HalfCloseableStream]],
    ) -> None:
        self._connect = connect
        self._dial = dial
        with ExitStack() as stack:
            if directory is None:
                directory = Path(tempfile.mkdtemp(prefix="supermachine-"))
                stack.callback(_remove, directory.rmdir)
                check.socket_directory(directory)
            else:
                check.socket_directory(directory)
                directory.mkdir(mode=0o700, exist_ok=True)
            name = directory.absolute() / f"vm-{secrets.token_hex(8)}"
            self.vsock_path: Path = Path(f"{name}-vsock.sock")
            self.exec_path: Path = Path(f"{name}-exec.sock")
            self._servers = [
                Server(_listen(path, stack), handle, MAX_CONNECTIONS)
                for path, handle in (
                    (self.vsock_path, self._serve_ports),
                    (self.exec_path, self._serve_agent),
                )
            ]
            self._stack = stack.pop_all()

    async def run(self) -> None:
        """Serve until cancelled."""
        with self._stack:
            async with trio.open_nursery() as nursery:
                for server in self._servers:
                    nursery.start_soon(server.run)

    async def _serve_ports(self, client: trio.SocketStream) -> None:
        try:
            route = await sniff(client)
        except ValueError as exc:
            trace("net", "%s: %s", self.vsock_path, exc)
            return
        if route is None:
            trace("net", "%s: a header that was never complete", self.vsock_path)
            return
        guest = await self._connect(route.port)
        await relay(client, guest, early=route.rest)

    async def _serve_agent(self, client: trio.SocketStream) -> None:
        await relay(client, await self._dial())


def _listen(path: Path, stack: ExitStack) -> trio.SocketListener:
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stack.callback(sock.close)
    os.fchmod(sock.fileno(), _MODE)  # bind gives the file this mode
    # Not the coroutine of Trio's socket, which resolves names: this has none.
    with socket.socket(fileno=os.dup(sock.fileno())) as plain:
        plain.bind(os.fspath(path))
        stack.callback(_remove, path.unlink)
    sock.listen(socket.SOMAXCONN)
    return trio.SocketListener(sock)


def _remove(remove: Callable[[], None]) -> None:
    with suppress(OSError):  # somebody has removed it, or has put something into it
        remove()
