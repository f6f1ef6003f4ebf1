"""Carriers: they move the packets of one muxer between this program and a machine.

Theory of operation of :class:`SocketCarrier`, the one for a stream of bytes. (The one for a
guest's own kernel is the device in :mod:`~trio_supermachine.devices.vsock`; the one in memory is
:mod:`.memory`.)

- *Sending* begins in the call that makes a packet: :meth:`~Carrier.flush` hands up to 128 KiB to
  the socket at once. What the socket does not take is copied, for its owner may change it, and the
  write loop sends it when there is room. Nothing more is taken out of the muxer until then, so this
  is all that a peer who does not read costs.
- *Receiving* is the read loop. Answers to what is received wait in the muxer; while too many of
  them do, it reads nothing more. Every 64 packets other tasks get a turn.
- *Quiet*, for a capture: :class:`~.framing.Framing` says FREEZE behind what was begun, and the peer
  answers FROZEN behind what *it* had begun. From then on no byte is on its way. The end of the
  block says THAW. A block that is given up before FROZEN has come sends THAW as soon as it comes.
- *The end* is whatever comes first: the end of file, an error of the socket, bytes that are no
  packets, or :meth:`~Carrier.close`. Then every stream of the muxer breaks.

The socket may be closed in any call that sends. So whoever waits for it looks again afterwards.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Protocol, final

import trio

from .connection import Connection
from .framing import Framing
from .muxer import Mux
from .packet import VsockProtocolError
from .parking import Parking

_READ_SIZE: Final = 256 * 1024
#: Bytes that are handed to the socket at once; also the bound of what waits for it.
_BATCH: Final = 128 * 1024
#: Packets handled before other tasks get a turn.
_TURN: Final = 64


class Packets(Protocol):
    """A muxer as its carrier sees it: packets go in and out of ``core``."""

    @property
    def core(self) -> Mux:
        """The connections; a carrier calls its ``receive``, ``refuse`` and ``pull``."""

    def touched(self, connection: Connection) -> None:
        """Wake whoever waits for a change of this connection, which a packet may have made."""

    def pulled(self) -> None:
        """Wake those whose data has gone, after packets were pulled."""

    def end(self, reason: str) -> None:
        """Break every stream, as the carrier has ended. Plain and idempotent."""

    def check_alive(self) -> None:
        """Raise what a dial raises once the carrier has ended; do nothing before."""


class Carrier(ABC):
    """Mover of one muxer's packets, for as long as :meth:`serve` runs."""

    @abstractmethod
    def attach(self, mux: Packets) -> None:
        """Carry the packets of ``mux``. Called once, before all else."""

    @abstractmethod
    def flush(self) -> None:
        """Send the packets that are ready, as far as they go now; :meth:`serve` sends the rest.

        Plain, so that a packet can leave in the very call that makes it.
        """

    @abstractmethod
    async def serve(self) -> None:
        """Move packets until the carrier ends or this is cancelled. Called once.

        :raises VsockProtocolError: the peer sent nonsense.
        """

    @abstractmethod
    def quiet(self) -> AbstractAsyncContextManager[None]:
        """Hold all packets back for a block, in both directions; streams only wait meanwhile.

        The block is entered when no packet, nor part of one, is on its way. For one task.

        :raises trio.BrokenResourceError: the carrier has ended.
        """

    @abstractmethod
    def reset_peer(self) -> None:
        """Tell a peer that was restored that its connections are gone.

        Called before :meth:`serve`, or never.
        """

    @abstractmethod
    def close(self) -> None:
        """End the carrier. Plain and idempotent."""


@final
class SocketCarrier(Carrier):
    """Packets back to back on a connected stream socket, such as a virtio-serial port's.

    :param sock: the carrier takes it over: the caller must not use it any more.
    """

    def __init__(self, sock: socket.socket | trio.socket.SocketType | trio.SocketStream) -> None:
        inner = sock.socket if isinstance(sock, trio.SocketStream) else sock
        if not isinstance(inner, socket.socket):
            family, kind, proto = inner.family, inner.type, inner.proto
            inner = socket.socket(family, kind, proto, fileno=inner.detach())
        inner.setblocking(False)
        self._socket = inner
        self._buffer = memoryview(bytearray(_READ_SIZE))
        self._unsent: list[bytes | memoryview] = []
        self._writer = Parking()
        self._reader = Parking()
        self._stillness = Parking()

    def attach(self, mux: Packets) -> None:
        self._mux = mux
        self._framing = Framing(mux.core)

    def reset_peer(self) -> None:
        self._framing.reset_peer()

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        self._mux.check_alive()
        self._framing.freeze()
        self.flush()
        try:
            while not self._framing.still:
                await self._stillness.park()
                self._mux.check_alive()
            yield
        finally:
            self._framing.thaw()
            self.flush()

    async def serve(self) -> None:
        fault: VsockProtocolError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_loop)
            try:
                await self._read_loop()
            except VsockProtocolError as exc:
                fault = exc
            except (OSError, trio.ClosedResourceError) as exc:
                self._broke(exc)
            nursery.cancel_scope.cancel()
        if fault is not None:
            raise fault

    async def _read_loop(self) -> None:
        mux = self._mux
        core = mux.core
        while True:
            data = await self._receive()
            if not data:
                return
            for count, connection in enumerate(self._framing.receive(data), 1):
                if connection is not None:
                    mux.touched(connection)
                elif self._framing.still:
                    self._stillness.wake()
                if count % _TURN == 0:
                    self.flush()
                    while core.congested:
                        await self._reader.park()
                    await trio.lowlevel.checkpoint()
            if self._framing.has_output:
                self.flush()

    async def _receive(self) -> memoryview:
        """Wait for bytes, which are good until the next call; empty at the end."""
        while True:
            await trio.lowlevel.wait_readable(self._open_fd())
            try:
                return self._buffer[: self._socket.recv_into(self._buffer)]
            except BlockingIOError:
                pass

    def flush(self) -> None:
        while self._framing.has_output and not self._unsent and self._socket.fileno() >= 0:
            self._unsent = self._framing.pull(_BATCH)
            self._send_unsent()
            # What waits for the socket is copied: its user may change it from here on.
            self._unsent = [_owned(buffer) for buffer in self._unsent]
            self._mux.pulled()
        if self._unsent:
            self._writer.wake()
        if not self._mux.core.congested:
            self._reader.wake()

    def _send_unsent(self) -> None:
        buffers = self._unsent
        try:
            while buffers:
                _consume(buffers, self._socket.sendmsg(buffers))
        except BlockingIOError:
            pass
        except OSError as exc:
            self._broke(exc)

    async def _write_loop(self) -> None:
        try:
            while True:
                if self._unsent:
                    await trio.lowlevel.wait_writable(self._open_fd())
                    self._send_unsent()
                    self.flush()
                else:
                    await self._writer.park()
        except (OSError, trio.ClosedResourceError) as exc:
            self._broke(exc)

    def _broke(self, exc: Exception) -> None:
        self._mux.end(f"the machine's channel broke: {exc}")

    def _open_fd(self) -> int:
        fd = self._socket.fileno()
        if fd < 0:  # a send found it broken, and closed it
            raise trio.ClosedResourceError("the carrier is closed")
        return fd

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket.fileno())
            self._socket.close()
        self._unsent.clear()
        self._stillness.wake()


def _owned(buffer: bytes | memoryview) -> bytes | memoryview:
    """Copy ``buffer``, unless nobody can change it."""
    if isinstance(buffer, bytes) or isinstance(buffer.obj, bytes):
        return buffer
    return bytes(buffer)


def _consume(buffers: list[bytes | memoryview], size: int) -> None:
    """Take ``size`` bytes off the front."""
    for index, buffer in enumerate(buffers):
        if size < len(buffer):
            del buffers[:index]
            if size:
                buffers[0] = memoryview(buffer)[size:]
            return
        size -= len(buffer)
    buffers.clear()
