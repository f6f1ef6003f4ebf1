"""The network of one VM: its forwards, its unix sockets and its way out, and their tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, final

import trio

from .._util.trace import trace
from ..agent import wire
from ..agent.client import AgentClient
from ..errors import VmExited
from ..vsock.stream import VsockStream
from .egress import EgressServer
from .forward import TcpForwarder, open_tcp, open_tls
from .policy import EgressPolicy
from .serving import Server
from .sockets import UnixSockets

if TYPE_CHECKING:
    from .tls import TlsConfig
    from .udp import UdpForwarder, UdpServer


@final
class VmNetwork:
    """The connections of one VM.

    It is made before the guest runs, so that the guest finds a listener for its way out.

    :param directory: the place of its unix sockets, which are then there from the start;
        ``None`` makes them when they are asked for, in a private directory.
    :ivar egress: the guest's way out.
    """

    def __init__(self, client: AgentClient, policy: EgressPolicy, directory: Path | None) -> None:
        self._client = client
        self._directory = directory
        self.egress: EgressServer = EgressServer(client.machine.listen(wire.EGRESS_PORT), policy)
        self._nursery: trio.Nursery | None = None
        self._error = VmExited("stopped")
        self._sockets: UnixSockets | None = None
        self._forwards: set[Server | UdpServer] = set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until :meth:`end`, or until this is cancelled.

        It has started when the sockets in the directory are there.

        :raises OSError: unix sockets cannot be made in the directory.
        """
        if self._directory is not None:
            self._sockets = self._make_sockets()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self.egress.run)
                if self._sockets is not None:
                    nursery.start_soon(self._sockets.run)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def end(self, error: VmExited) -> None:
        """Note that the machine has ended; :meth:`run` returns. Plain.

        :param error: the exception of calls from now on.
        """
        self._error = error
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def connect(self, port: int) -> VsockStream:
        """Connect to a TCP port of the guest as :meth:`Vm.connect`; 0 is the first listener."""
        stream, _ = await self._client.connect(port)
        return stream

    def sockets(self) -> UnixSockets:
        """Give the VM's unix sockets, and make them first if there are none."""
        if self._sockets is None:
            nursery = self._live()
            self._sockets = self._make_sockets()
            nursery.start_soon(self._sockets.run)
        return self._sockets

    def _make_sockets(self) -> UnixSockets:
        return UnixSockets(self._directory, self.connect, self._client.dial)

    async def expose_tcp(
        self, host: str, host_port: int, guest_port: int, max_connections: int
    ) -> TcpForwarder:
        """Serve a forward as :meth:`Vm.expose_tcp`."""
        self._live()
        server, forwarder = await open_tcp(
            self.connect, host, host_port, guest_port, max_connections
        )
        self._start(server, name=repr(forwarder))
        return forwarder

    async def expose_tls(self, config: TlsConfig, max_connections: int) -> TcpForwarder:
        """Serve a forward as :meth:`Vm.expose_tls`."""
        self._live()
        server, forwarder = await open_tls(self.connect, config, max_connections)
        self._start(server, name=repr(forwarder))
        return forwarder

    async def expose_udp(self, host: str, host_port: int, guest_port: int) -> UdpForwarder:
        """Serve a forward as :meth:`Vm.expose_udp`."""
        from .udp import open_udp  # few VMs have such a forward

        self._live()
        server, forwarder = await open_udp(self._client.connect_udp, host, host_port, guest_port)
        self._start(server, name=repr(forwarder))
        return forwarder

    def end_forwards(self) -> None:
        """End all forwards, soon. Plain."""
        for server in self._forwards:
            server.cancel()

    def _start(self, server: Server | UdpServer, name: str) -> None:
        try:
            self._live().start_soon(self._run, server, name=name)
        except VmExited:
            server.cancel()
            raise
        self._forwards.add(server)  # here: its task may not have run when all are ended
        trace("net", "%s", name)

    async def _run(self, server: Server | UdpServer) -> None:
        try:
            await server.run()
        finally:
            self._forwards.discard(server)

    def _live(self) -> trio.Nursery:
        if self._nursery is None or self._nursery.cancel_scope.cancel_called:
            raise self._error
        return self._nursery
