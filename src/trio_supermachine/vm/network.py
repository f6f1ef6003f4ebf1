"""The calls of a VM that connect the host with what listens in the guest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import trio

from .._util import validators as check
from ..net.events import EgressEvent
from ..net.forward import MAX_CONNECTIONS, TcpForwarder
from .running import RunningVm

if TYPE_CHECKING:
    from ..net.tls import TlsConfig
    from ..net.udp import UdpForwarder


class GuestNetwork:
    """The calls of :class:`Vm` that connect the host with the guest."""

    _running: RunningVm

    async def connect(self, port: int | None = None) -> trio.abc.HalfCloseableStream:
        r"""Connect to a TCP listener in the guest, on its loopback or any address.

        The stream is a connection of its own, and ends as TCP's do: by an end of data in each
        direction, or by :exc:`trio.BrokenResourceError` when the guest resets it. Close it when
        done. Cancelled, nothing is left of it.

        :param port: the port; ``None`` is that of the first listener. The guest watches listeners
            from the first such question on. Of several that were there before, on several
            processors, another one may be taken for the first.
        :raises ConnectionRefusedError: nothing listens there; see :meth:`wait_listening`.
        :raises VmExited: the VM has ended.
        :raises ConfigError: ``port`` is no port.

        Example::

            port = await vm.wait_listening()
            async with await vm.connect(port) as stream:
                await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
                print(await stream.receive_some())
        """
        return await self._running.network.connect(
            0 if port is None else check.port("port", port, 1)
        )

    async def wait_listening(self, port: int | None = None) -> int:
        """Wait until a program in the guest listens on a TCP port, and give the port.

        A cancel scope is the timeout.

        :param port: the port to wait for; ``None`` is any, and gives the first listener's.
        :raises VmExited: the VM has ended.
        :raises ConfigError: ``port`` is no port.
        """
        return await self._running.wait_listening(
            0 if port is None else check.port("port", port, 1)
        )

    async def expose_tcp(
        self,
        host_port: int = 0,
        guest_port: int = 0,
        *,
        host: str = "127.0.0.1",
        max_connections: int = MAX_CONNECTIONS,
    ) -> TcpForwarder:
        r"""Forward a TCP port of the host to one of the guest.

        The forward lasts until it is closed, or the VM ends. Each client's connection is connected
        to the guest when it comes, and reset if nothing listens there. Ends of data and resets
        pass through, both ways. Cancelled, no port is taken.

        :param host_port: the host's port; 0 is a free one, see :attr:`TcpForwarder.local_addr`.
        :param guest_port: the guest's port; 0 is that of the first listener.
        :param host: the host's address to listen on, or a name that has one. Other machines may
            reach any address but a loopback one.
        :param max_connections: the most connections at once; more wait in the listener's backlog.
        :raises OSError: the address is not available; ``EADDRINUSE`` if another program uses it.
        :raises ConfigError: a value makes no sense.
        :raises VmExited: the VM has ended.

        Example::

            forwarder = await vm.expose_tcp(guest_port=8000)
            host, port = forwarder.local_addr
            async with await trio.open_tcp_stream(host, port) as stream:
                await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
        """
        return await self._running.network.expose_tcp(host, host_port, guest_port, max_connections)

    async def expose_tls(
        self, config: TlsConfig, *, max_connections: int = MAX_CONNECTIONS
    ) -> TcpForwarder:
        """Forward a TCP port of the host, with TLS towards the clients; the guest gets plain data.

        A client has 10 s for its handshake, and counts as a connection meanwhile. The client's
        close_notify is an end of data for the guest, and the guest's end is close_notify for the
        client. A connection that ends without close_notify is reset in the guest.

        :param config: the address, the certificate and its key.
        :param max_connections: see :meth:`expose_tcp`.
        :raises ConfigError: a file is not the PEM that it should be; the message names it.
        :raises OSError: a file cannot be read, or see :meth:`expose_tcp`.
        :raises VmExited: the VM has ended.
        """
        return await self._running.network.expose_tls(config, max_connections)

    async def expose_udp(
        self, host_port: int = 0, guest_port: int = 0, *, host: str = "127.0.0.1"
    ) -> UdpForwarder:
        """Forward a UDP port of the host to one of the guest, until it is closed or the VM ends.

        Each client has a flow of its own, which ends after 60 s of silence. There are 256 flows at
        most: a new client ends the flow that was silent for the longest. Datagrams are dropped
        where the guest is slow.

        :param host_port: see :meth:`expose_tcp`.
        :param guest_port: the guest's port; it must be given.
        :param host: see :meth:`expose_tcp`.
        :raises OSError: see :meth:`expose_tcp`.
        :raises ConfigError: a value makes no sense.
        :raises VmExited: the VM has ended.
        """
        return await self._running.network.expose_udp(host, host_port, guest_port)

    @property
    def vsock_path(self) -> Path:
        """Path of a host unix socket by which other programs reach the guest's TCP ports.

        A connection begins with 20 bytes: ``SMUX-PORT-V1``, padded with NULs to 16 bytes, and the
        guest's port as a big-endian u32. A connection that begins otherwise, or sends nothing for
        20 ms, goes to the first listener, with all that it sent. Only this user may connect. The
        socket is in :attr:`VmConfig.vsock_mux_dir`, from the start of the VM to its end; without
        that, it is made in a private directory when this is first read.

        :raises ConfigError: the path of the directory is too long for a unix socket.
        :raises OSError: the sockets cannot be made.
        :raises VmExited: the VM has ended, and nobody has asked before.
        """
        return self._running.network.sockets().vsock_path

    @property
    def exec_path(self) -> Path:
        """Path of a host unix socket that leads to the guest's agent, by the agent's wire format.

        All else is as for :attr:`vsock_path`.
        """
        return self._running.network.sockets().exec_path

    def egress_events(self, max_buffer: int = 256) -> trio.MemoryReceiveChannel[EgressEvent]:
        """Receive an event for each thing that the guest tries to reach, from now on.

        Each says what was decided, and why. The channel ends with the VM. A slow reader loses the
        oldest events, which :attr:`EgressEvent.missed` counts; the guest never waits for it.

        :param max_buffer: the most events that wait for the reader.
        :raises ConfigError: ``max_buffer`` is no integer above 0.
        """
        return self._running.network.egress.subscribe(max_buffer)
