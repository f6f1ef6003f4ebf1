"""Endpoints: the hosts that are asked for a reference."""

from __future__ import annotations

import ipaddress
import re

import attrs

from ...errors import ConfigError, RegistryError
from ..reference import Reference, Transport
from .registries_conf import Location, RegistryTable, sources_of

_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HOST = re.compile(r"(?P<name>[A-Za-z0-9.\-_]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?")
_PATH = re.compile(r"[a-z0-9]+(?:[._\-/]+[a-z0-9]+)*")


@attrs.frozen(kw_only=True)
class Endpoint:
    """A repository on a host.

    :ivar name: the registry's name for people, under which its credentials and certificates are.
    :ivar path: the repository's name there; empty for the registry as a whole.
    :ivar insecure: whether certificates are not checked, and plain HTTP will do.
    """

    name: str
    path: str
    insecure: bool = False

    @property
    def host(self) -> str:
        """The host to ask, ``HOST[:PORT]``."""
        return "registry-1.docker.io" if self.name == "docker.io" else self.name

    @property
    def loopback(self) -> bool:
        """Whether the endpoint is on this very host."""
        match = _HOST.fullmatch(self.name)
        assert match is not None
        name = match["name"].strip("[]")
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return name == "localhost"

    @property
    def plain_allowed(self) -> bool:
        """Whether plain HTTP will do if the host does not speak HTTPS."""
        return self.insecure or self.loopback


def endpoint(location: str, *, insecure: bool = False) -> Endpoint:
    """Parse ``HOST[:PORT][/PATH]``.

    :raises ConfigError: it has another form.
    """
    name, slash, path = location.partition("/")
    match = _HOST.fullmatch(name)
    valid = match is not None and (match["port"] is None or 0 < int(match["port"]) < 65536)
    if valid and slash:
        valid = _PATH.fullmatch(path) is not None
    if match is not None and valid and name.startswith("["):
        try:
            ipaddress.IPv6Address(match["name"][1:-1])
        except ValueError:
            valid = False
    if not valid:
        raise ConfigError(f"{location[:256]!r} is not a registry's HOST[:PORT][/REPOSITORY]")
    if name in _DOCKER_HUB:
        name = "docker.io"
    return Endpoint(name=name, path=path, insecure=insecure)


def endpoints_of(
    reference: Reference, tables: list[RegistryTable], *, insecure: bool = False
) -> list[Endpoint]:
    """List the endpoints to ask for a ``docker`` reference: mirrors, and then the registry itself.

    :param tables: this host's configuration.
    :raises RegistryError: the configuration blocks the registry.
    :raises ConfigError: the configuration names an impossible place.
    """
    assert reference.transport is Transport.DOCKER
    assert reference.domain is not None
    whole = str(reference).removeprefix("docker://")
    sources, table = sources_of(whole, tables, by_digest=reference.digest is not None)
    if table is not None and table.blocked:
        raise RegistryError(
            f"{table.file} blocks {table.prefix}; change that file, or take the image elsewhere",
            registry=reference.domain,
        )
    return [_endpoint(source, reference, insecure) for source in sources]


def _endpoint(source: Location, reference: Reference, insecure: bool) -> Endpoint:
    name = source.location
    if reference.digest is not None:
        name = name.removesuffix(f"@{reference.digest}")
    if reference.tag is not None:
        name = name.removesuffix(f":{reference.tag}")
    return endpoint(name, insecure=insecure or source.insecure)
