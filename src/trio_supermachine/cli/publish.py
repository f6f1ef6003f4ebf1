"""The option ``--publish``: which port of the host leads to which of the guest."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import attrs

from .._util.validators import MAX_PORT
from ..api import Vm
from ..errors import ConfigError
from ..net.serving import format_address

if TYPE_CHECKING:
    from ..net.forward import TcpForwarder
    from ..net.udp import UdpForwarder

_LOOPBACK: Final = "127.0.0.1"

# An address has dots or brackets, so that a lone number in front is a port.
_SPEC = re.compile(
    r"(?:(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^:\[\]]*[^:\[\]0-9][^:\[\]]*):)?"
    r"(?:(?P<host_port>[0-9]{0,5}):)?"
    r"(?P<guest_port>[0-9]{1,5})"
    r"(?:/(?P<protocol>tcp|udp))?",
    re.ASCII,
)


@attrs.frozen
class Publish:
    """A port of the host, 0 for a free one, and the port of the guest that it leads to."""

    host: str
    host_port: int
    guest_port: int
    protocol: str

    @classmethod
    def parse(cls, text: str) -> Publish:
        """Parse ``[ADDRESS:][HOSTPORT:]GUESTPORT[/tcp|/udp]``. :raises ConfigError: it is not."""
        match = _SPEC.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"-p takes [ADDRESS:][HOSTPORT:]GUESTPORT[/udp], as in 8080:80, not {text!r}"
            )
        host = (match["host"] or _LOOPBACK).strip("[]")
        host_port, guest_port = int(match["host_port"] or 0), int(match["guest_port"])
        if host_port > MAX_PORT or not 0 < guest_port <= MAX_PORT:
            raise ConfigError(f"-p {text}: ports are 1 to {MAX_PORT}")
        return cls(host, host_port, guest_port, match["protocol"] or "tcp")

    async def expose(self, vm: Vm) -> str | None:
        """Forward the port until the VM ends; describe the forward if its port was left open.

        :raises ConfigError: the host's address cannot be had.
        """
        ports = self.host_port, self.guest_port
        forwarder: TcpForwarder | UdpForwarder
        try:
            if self.protocol == "udp":
                forwarder = await vm.expose_udp(*ports, host=self.host)
            else:
                forwarder = await vm.expose_tcp(*ports, host=self.host)
        except OSError as exc:
            raise ConfigError(f"-p: {exc.strerror}") from exc
        if self.host_port:
            return None
        return f"{self.guest_port}/{self.protocol} -> {format_address(*forwarder.local_addr)}"
