"""What carries vsock packets as bytes between this program and a machine."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, final

import trio

_READ_SIZE: Final = 256 * 1024


class Carrier(ABC):
    """A two-way stream of bytes with one reader and one writer.

    Sending never waits, so that a packet can leave in the very call that makes it; a carrier
    that is full says so, and :meth:`wait_writable` tells when to try again.
    """

    @abstractmethod
    def send_nowait(self, buffers: Sequence[bytes | memoryview]) -> int:
        """Send as much as goes at once; gives the number of bytes, 0 if the carrier is full.

        :raises OSError: the carrier has ended.
        """

    @abstractmethod
    async def wait_writable(self) -> None:
        """Wait until sending may work again.

        :raises trio.ClosedResourceError: it is closed.
        """

    @abstractmethod
    async def receive(self) -> memoryview:
        """Wait for bytes; empty at the end. The view is good until the next call.

        :raises OSError: the carrier has broken.
        :raises trio.ClosedResourceError: it is closed.
        """

    @abstractmethod
    def close(self) -> None:
        """End the carrier. Plain and idempotent; whoever waits for it gets an exception."""


@final
class SocketCarrier(Carrier):
    """A connected stream socket as the carrier, such as one end of a socket pair.

    Takes the socket over: the object passed in must not be used any more.
    """

    def __init__(self, sock: socket.socket | trio.socket.SocketType | trio.SocketStream) -> None:
        inner = sock.socket if isinstance(sock, trio.SocketStream) else sock
        if not isinstance(inner, socket.socket):
            family, kind, proto = inner.family, inner.type, inner.proto
            inner = socket.socket(family, kind, proto, fileno=inner.detach())
        inner.setblocking(False)
        self._socket = inner
        self._buffer = memoryview(bytearray(_READ_SIZE))

    def send_nowait(self, buffers: Sequence[bytes | memoryview]) -> int:
        try:
            return self._socket.sendmsg(buffers)
        except BlockingIOError:
            return 0

    async def wait_writable(self) -> None:
        await trio.lowlevel.wait_writable(self._open_fd())

    async def receive(self) -> memoryview:
        while True:
            await trio.lowlevel.wait_readable(self._open_fd())
            try:
                return self._buffer[: self._socket.recv_into(self._buffer)]
            except BlockingIOError:
                pass

    def _open_fd(self) -> int:
        fd = self._socket.fileno()
        if fd < 0:  # a send found it broken, and closed it, since its last wait
            raise trio.ClosedResourceError("the carrier is closed")
        return fd

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket.fileno())
            self._socket.close()
