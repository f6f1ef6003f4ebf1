"""Policies of what a guest may reach: values, read from text and written as text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from ipaddress import ip_address, ip_network
from typing import Any, Final, final

import attrs

from .._public import public
from .._util import validators as check
from ..errors import ConfigError
from .addresses import Address, Network, unmapped_network

DEFAULT_CONNECTIONS: Final = 512
MAX_CONNECTIONS: Final = 2048

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# The last label of what inet_aton(3) reads as an address: 127.1, 0x7f000001, 017700000001.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORT_ITEM = re.compile(r":[0-9]{1,5}")
_HOST_AND_PORT = re.compile(r"(.*[^:])(:[0-9]{1,5})")


class PolicyKind(Enum):
    """Kinds of policies; the value is the word that a policy's text begins with."""

    ALLOW_ALL = "allow_all"
    DENY_ALL = "deny_all"
    DENY_PRIVATE = "deny_private"
    ALLOW = "allowlist"
    DENY = "denylist"


_WITH_LIST: Final = (PolicyKind.ALLOW, PolicyKind.DENY)


def is_host_name(name: str) -> bool:
    """Say whether this is a lower-case name of DNS that no program takes for an address."""
    labels = name.split(".")
    return (
        0 < len(name) <= 253
        and all(_LABEL.fullmatch(label) for label in labels)
        and not _NUMBER.fullmatch(labels[-1])
    )


def _listed(what: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str):
        raise ConfigError(f"{what} must be a sequence, not one value: {values!r}")
    try:
        return tuple(values)
    except TypeError:
        raise ConfigError(f"{what} must be a sequence, not {values!r}") from None


def _host(value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"a host must be a name, not {value!r}")
    name = value.lower().removesuffix(".")
    if not is_host_name(name.removeprefix("*.")):
        raise ConfigError(
            f"a host must be a name such as example.org or *.example.org, not {value!r}"
            " (addresses are cidrs; other scripts are written as xn--...)"
        )
    return name


def _cidr(value: Any) -> Network:
    if not isinstance(value, str | Address | Network):
        raise ConfigError(f"a cidr must be a network such as 10.0.0.0/8, not {value!r}")
    try:
        return unmapped_network(ip_network(value))
    except ValueError as exc:
        raise ConfigError(f"a cidr must be a network such as 10.0.0.0/8, not {value!r}") from exc


def _port(value: object) -> int:
    return check.port("a port", value, 1)


def _hosts(values: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_host, _listed("hosts", values))))


def _cidrs(values: Any) -> tuple[Network, ...]:
    return tuple(dict.fromkeys(map(_cidr, _listed("cidrs", values))))


def _ports(values: Any) -> tuple[int, ...]:
    return tuple(sorted({_port(value) for value in _listed("ports", values)}))


@public
@final
@attrs.frozen(kw_only=True)
class EgressPolicy:
    """A policy of what one VM's guest may reach. The class methods make it; it never changes.

    No policy opens loopback and unspecified addresses, multicast, broadcast, and the library's
    own range. The host's loopback is reached only by :meth:`allow` with the host
    ``host.supermachine.internal``.

    :ivar kind: the kind; its value is the word that the policy's text begins with.
    :ivar hosts: names, or ``*.name`` for all names below one.
    :ivar cidrs: networks.
    :ivar ports: ports of TCP and UDP; none means all of them.
    :ivar connections: the number of TCP connections and UDP flows that go out at once, 0 to 2048.
    :ivar bytes_per_second: of both directions and all connections together; ``None`` is no limit.
    :raises ConfigError: a value makes no sense.

    Example::

        from trio_supermachine import EgressPolicy, Vm, VmConfig

        policy = EgressPolicy.allow(hosts=["pypi.org", "*.pythonhosted.org"], ports=[443])
        async with Vm.start(image, VmConfig(egress=policy)) as vm:
            ...
    """

    kind: PolicyKind = attrs.field(validator=attrs.validators.instance_of(PolicyKind))
    hosts: tuple[str, ...] = attrs.field(default=(), converter=_hosts)
    cidrs: tuple[Network, ...] = attrs.field(default=(), converter=_cidrs)
    ports: tuple[int, ...] = attrs.field(default=(), converter=_ports)
    connections: int = attrs.field(default=DEFAULT_CONNECTIONS)
    bytes_per_second: int | None = attrs.field(default=None)

    @connections.validator
    def _check_connections(self, field: object, value: object) -> None:
        check.integer("connections", value, 0, MAX_CONNECTIONS)

    @bytes_per_second.validator
    def _check_rate(self, field: object, value: object) -> None:
        if value is not None:
            check.integer("bytes_per_second", value, 1)

    def __attrs_post_init__(self) -> None:
        has_list = bool(self.hosts or self.cidrs or self.ports)
        if has_list != (self.kind in _WITH_LIST):
            wanted = "nothing" if has_list else "a list of hosts, cidrs or ports"
            raise ConfigError(f"{self.kind.value} takes {wanted}")

    @classmethod
    def allow_all(cls) -> EgressPolicy:
        """Allow everything that the host can reach, but for its loopback."""
        return cls(kind=PolicyKind.ALLOW_ALL)

    @classmethod
    def deny_all(cls) -> EgressPolicy:
        """Allow nothing, and no names."""
        return cls(kind=PolicyKind.DENY_ALL)

    @classmethod
    def deny_private(cls) -> EgressPolicy:
        """Allow the public Internet: no private address, and none that the host itself has."""
        return cls(kind=PolicyKind.DENY_PRIVATE)

    @classmethod
    def allow(
        cls,
        hosts: Iterable[str] = (),
        cidrs: Iterable[str | Network | Address] = (),
        ports: Iterable[int] = (),
    ) -> EgressPolicy:
        """Allow only what is listed; with nothing listed, it is :meth:`deny_all`.

        :param hosts: names (``*.name`` for those below it): the guest may look these up, and
            connect to the addresses that it was told for them, if they are public or in ``cidrs``.
            ``host.supermachine.internal`` is the host's loopback.
        :param cidrs: networks that it may connect to, private ones too.
        :param ports: the ports to which all that is restricted; alone, they are ports of public
            addresses, and any name may be looked up.
        """
        return cls._of_list(PolicyKind.ALLOW, PolicyKind.DENY_ALL, hosts, cidrs, ports)

    @classmethod
    def deny(
        cls,
        hosts: Iterable[str] = (),
        cidrs: Iterable[str | Network | Address] = (),
        ports: Iterable[int] = (),
    ) -> EgressPolicy:
        """Allow everything but what is listed, private addresses included.

        With nothing listed, it is :meth:`allow_all`.

        :param hosts: names (``*.name`` for those below it) that the guest may not look up. With
            ``ports`` it may look them up, but not connect to these ports of the addresses that it
            was told.
        :param cidrs: networks that it may not connect to.
        :param ports: the ports to which the refusal is restricted; alone, they are refused at all
            addresses.
        """
        return cls._of_list(PolicyKind.DENY, PolicyKind.ALLOW_ALL, hosts, cidrs, ports)

    @classmethod
    def _of_list(
        cls, kind: PolicyKind, unlisted: PolicyKind, hosts: Any, cidrs: Any, ports: Any
    ) -> EgressPolicy:
        lists = _hosts(hosts), _cidrs(cidrs), _ports(ports)
        if not any(lists):
            return cls(kind=unlisted)
        return cls(kind=kind, hosts=lists[0], cidrs=lists[1], ports=lists[2])

    @classmethod
    def parse(cls, text: str) -> EgressPolicy:
        """Read a policy from text, which :class:`str` of a policy gives without its limits.

        :param text: ``allow_all``, ``deny_all``, ``deny_private``, or ``allowlist:`` or
            ``denylist:`` followed by networks, names of hosts, and ports written as ``:443``, with
            commas between them.
        :raises ConfigError: it is none of these.
        """
        if not isinstance(text, str):
            raise ConfigError(f"an egress policy must be text, not {text!r}")
        word, colon, rest = text.strip().partition(":")
        known = {kind.value: kind for kind in PolicyKind}
        kind = known.get(word.strip())
        if kind is None:
            raise ConfigError(
                f"egress policy {text!r}: it must begin with one of {', '.join(known)}"
            )
        if bool(rest.strip()) != (kind in _WITH_LIST) or (colon and kind not in _WITH_LIST):
            wanted = "is followed by ':' and a list" if kind in _WITH_LIST else "stands alone"
            raise ConfigError(f"egress policy {text!r}: {kind.value} {wanted}")
        return _parse_list(text, kind, rest) if rest else cls(kind=kind)

    def with_limits(
        self, connections: int = DEFAULT_CONNECTIONS, bytes_per_second: int | None = None
    ) -> EgressPolicy:
        """Give a copy with these limits.

        :param connections: TCP connections and UDP flows that go out at once, 0 to 2048.
        :param bytes_per_second: of both directions and all connections together; ``None`` is no
            limit.
        """
        return attrs.evolve(self, connections=connections, bytes_per_second=bytes_per_second)

    def __str__(self) -> str:
        if self.kind not in _WITH_LIST:
            return str(self.kind.value)
        ports = (f":{port}" for port in self.ports)
        return f"{self.kind.value}:" + ",".join((*self.hosts, *map(str, self.cidrs), *ports))


def _parse_list(text: str, kind: PolicyKind, rest: str) -> EgressPolicy:
    hosts: list[str] = []
    cidrs: list[str] = []
    ports: list[int] = []
    for item in map(str.strip, rest.split(",")):
        try:
            if _PORT_ITEM.fullmatch(item):
                ports.append(_port(int(item[1:])))
            elif (both := _HOST_AND_PORT.fullmatch(item)) and not _is_address(item):
                host, port = both[1].strip("[]"), both[2]
                raise ConfigError(
                    f"{item!r} is a host with a port; list them apart, as {host},{port}"
                    " (a port is that of all that is listed)"
                )
            elif _looks_numeric(item):
                cidrs.append(str(_cidr(item)))
            else:
                hosts.append(_host(item))
        except ConfigError as exc:
            raise ConfigError(f"egress policy {text!r}: {exc}") from exc
    return EgressPolicy(kind=kind, hosts=hosts, cidrs=cidrs, ports=ports)


def _looks_numeric(item: str) -> bool:
    """Say whether an item is written like an address or a network."""
    if "/" in item or ":" in item or _is_address(item):
        return True
    return bool(_NUMBER.fullmatch(item.rpartition(".")[2]))


def _is_address(item: str) -> bool:
    try:
        ip_address(item)
    except ValueError:
        return False
    return True
