"""The calls of a VM that connect the host with what listens in the guest."""

from __future__ import annotations

from pathlib import Path

import trio

from .._util import validators as check
from ..net.events import EgressEvent
from ..net.forward import MAX_CONNECTIONS, TcpForwarder
from ..net.tls import TlsConfig
from ..net.udp import UdpForwarder
from .running import RunningVm


class GuestNetwork:
    """The calls of :class:`Vm` that connect the host with the guest."""

    _running: RunningVm

    async def connect(self, port: int | None = None) -> trio.abc.HalfCloseableStream:
        """Connect to what listens on a TCP port in the guest, on its loopback or any address.

        The stream is a connection of its own, and ends as TCP's do: by an end of data in each
        direction, or by :exc:`trio.BrokenResourceError` when the guest resets it. Close it when
        done. Cancelled, nothing is left of it.

        :param port: the port; ``None`` is the one that was listened on first. Of several that began
            before anyone asked, in a guest with several processors, it may be another; then it
            stays this one as long as it is listened on.
        :raises ConnectionRefusedError: nothing listens there; see :meth:`wait_listening`.
        :raises VmExited: the VM has ended.
        :raises ConfigError: ``port`` is none.
        """
        return await self._running.network.connect(
            0 if port is None else check.port("port", port, 1)
        )

    async def wait_listening(self, port: int | None = None) -> int:
        """Wait until a program in the guest listens on a TCP port, and give the port.

        A cancel scope is the timeout.

        :param port: the port to wait for; ``None`` is any, and gives the one that was first.
        :raises VmExited: the VM has ended.
        :raises ConfigError: ``port`` is none.
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
        """Have a TCP port of the host lead to one of the guest, until it is closed or the VM ends.

        Each client's connection is connected to the guest as it comes: one that finds nothing
        listening there is reset. Ends of data and resets pass through, both ways. Cancelled,
        it has taken nothing.

        :param host_port: the host's port; 0 is a free one, see :attr:`TcpForwarder.local_addr`.
        :param guest_port: the guest's; 0 is the one that was listened on first.
        :param host: the host's address to listen on, or a name that has one. What is beyond
            ``127.0.0.1`` may be open to others.
        :param max_connections: how many there are at once; more wait in the listener's backlog.
        :raises OSError: the address cannot be had; ``EADDRINUSE`` if another program has it.
        :raises ConfigError: a value makes no sense.
        :raises VmExited: the VM has ended.
        """
        return await self._running.network.expose_tcp(host, host_port, guest_port, max_connections)

    async def expose_tls(
        self, config: TlsConfig, *, max_connections: int = MAX_CONNECTIONS
    ) -> TcpForwarder:
        """The same with TLS towards the clients; the guest gets what it protects.

        A client has 10 s for its handshake, and counts as a connection meanwhile. The client's
        close_notify is an end of data for the guest, and the guest's end is close_notify for the
        client. A connection that ends without is reset in the guest.

        :param max_connections: as of :meth:`expose_tcp`.
        :raises ConfigError: a file is not the PEM that it should be; the message names it.
        :raises OSError: a file cannot be read, or as of :meth:`expose_tcp`.
        """
        return await self._running.network.expose_tls(config, max_connections)

    async def expose_udp(
        self, host_port: int = 0, guest_port: int = 0, *, host: str = "127.0.0.1"
    ) -> UdpForwarder:
        """Have a UDP port of the host lead to one of the guest, until it is closed or the VM ends.

        Each client has a flow of its own, which ends after 60 s of silence; of more than 256 the
        one that was silent for the longest goes. Datagrams are dropped where the guest is slow.

        :param host_port: as of :meth:`expose_tcp`, and so ``host``.
        :param guest_port: the guest's port, which has to be given.
        :raises OSError: as of :meth:`expose_tcp`.
        :raises ConfigError: a value makes no sense.
        """
        return await self._running.network.expose_udp(host, host_port, guest_port)

    @property
    def vsock_path(self) -> Path:
        """A unix socket of the host for programs that want to connect to the guest's TCP ports.

        A connection to it begins with the 16 bytes ``SMUX-PORT-V1`` and NULs, and the guest's
        port as a big-endian u32. One that begins otherwise, or says nothing for 20 ms, is led to
        the port that was listened on first, with all that it said. It is there for this user
        alone, in :attr:`VmConfig.vsock_mux_dir` from the start, or else from the first look at
        this in a private directory, until the VM ends.

        :raises ConfigError: the path of the directory is too long for a unix socket.
        :raises OSError: the sockets cannot be made.
        :raises VmExited: the VM has ended, and nobody has asked before.
        """
        return self._running.network.sockets().vsock_path

    @property
    def exec_path(self) -> Path:
        """A unix socket of the host that leads to the guest's agent, for programs that speak its
        wire format. As :attr:`vsock_path` in all else.
        """
        return self._running.network.sockets().exec_path

    def egress_events(self, max_buffer: int = 256) -> trio.MemoryReceiveChannel[EgressEvent]:
        """What the guest tried to reach, from now on, each with what was decided and why.

        The channel ends with the VM. A slow reader loses the oldest events, which
        :attr:`EgressEvent.missed` counts; the guest never waits for it.

        :param max_buffer: the events that wait for the reader.
        :raises ConfigError: ``max_buffer`` is no integer above 0.
        """
        return self._running.network.egress.subscribe(max_buffer)
