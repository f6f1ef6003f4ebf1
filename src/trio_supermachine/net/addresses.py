"""Kinds of addresses, and the addresses that have a meaning of their own in a guest.

An IPv4-mapped IPv6 address counts as the IPv4 address that it maps. The tables are those of IANA's
special-purpose registries (RFC 6890 and its updates) as of October 2025, so that what is private
does not depend on the version of Python.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: The guest's name for the host's loopback.
HOST_NAME: Final = "host.supermachine.internal"

RESOLVER: Final = IPv4Address("192.0.0.1")
GUEST4: Final = IPv4Address("192.0.0.2")
GUEST6: Final = IPv6Address("fd73:6d00::2")
HOST4: Final = IPv4Address("192.0.0.3")
HOST6: Final = IPv6Address("fd73:6d00::3")
DNS_PORT: Final = 53

_HOST: Final = (HOST4, HOST6)


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in texts)


#: Networks that exist inside a guest only: RFC 7335's range, and the library's own.
_GUEST_RANGES: Final = _networks("192.0.0.0/29", "fd73:6d00::/48")

#: Networks that no policy opens: they reach the host itself, or nobody, or many.
_NEVER: Final = (
    *_networks("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32"),
    # ::/96 holds the unspecified address, the loopback and IPv4-compatible addresses.
    *_networks("::/96", "ff00::/8"),
    *_GUEST_RANGES,
)

#: Networks where clouds tell a machine its secrets. Not all are in private ranges.
_METADATA: Final = (
    *_networks("169.254.0.0/16", "fe80::/10"),
    *_networks("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),
    *_networks("fd00:ec2::/32", "fd00:42::42/128", "fd20:ce::254/128"),
)

#: Parts of the ranges below that the registries call globally reachable.
_REACHABLE: Final = _networks(
    "192.0.0.9/32",
    "192.0.0.10/32",
    "2001:1::1/128",
    "2001:1::2/128",
    "2001:1::3/128",
    "2001:3::/32",
    "2001:4:112::/48",
    "2001:20::/28",
    "2001:30::/28",
)
_PRIVATE: Final = _networks(
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "2001::/23",
    "2001:db8::/32",
    "3fff::/20",
)
#: The one range of IPv6 that IANA allocates from; the rest is reserved or local (RFC 4291).
_GLOBAL6: Final = IPv6Network("2000::/3")

_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_SIX_TO_FOUR: Final = IPv6Network("2002::/16")
_TEREDO: Final = IPv6Network("2001::/32")
_NAT64: Final = IPv6Network("64:ff9b::/96")

_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
#: Addresses of documentation (RFC 5737, RFC 3849), which no host has.
_NOBODY: Final[dict[int, Address]] = {
    4: IPv4Address("203.0.113.203"),
    6: IPv6Address("2001:db8:dead::203"),
}


def unmapped(address: Address) -> Address:
    """Give the IPv4 address that an IPv4-mapped one stands for; any other as it is."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def unmapped_network(network: Network) -> Network:
    """Give the IPv4 network that an IPv4-mapped one stands for; any other as it is."""
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        first = IPv4Address(int(network.network_address) & 0xFFFF_FFFF)
        return IPv4Network((first, network.prefixlen - _MAPPED.prefixlen))
    return network


def contains(networks: Iterable[Network], address: Address) -> bool:
    """Say whether one of ``networks`` holds ``address``."""
    return any(address in network for network in networks)


def embedded(address: Address) -> tuple[IPv4Address, ...]:
    """Give the IPv4 addresses to which a translator or tunnel may carry packets for this one.

    These are 6to4 (RFC 3056), Teredo (RFC 4380) and NAT64 (RFC 6052).
    """
    if not isinstance(address, IPv6Address):
        return ()
    value = int(address)
    if address in _SIX_TO_FOUR:
        return (IPv4Address(value >> 80 & 0xFFFF_FFFF),)
    if address in _TEREDO:  # the server, and the client behind it, whose bits are inverted
        return IPv4Address(value >> 64 & 0xFFFF_FFFF), IPv4Address(~value & 0xFFFF_FFFF)
    if address in _NAT64:
        return (IPv4Address(value & 0xFFFF_FFFF),)
    return ()


def is_host(address: Address) -> bool:
    """Say whether this is the guest's address for the host's loopback."""
    return address in _HOST


def is_never(address: Address) -> bool:
    """Say whether no policy lets a guest send anything here."""
    return any(contains(_NEVER, each) for each in (address, *embedded(address)))


def is_metadata(address: Address) -> bool:
    """Say whether this is link-local, or a cloud's metadata service may answer here."""
    return any(contains(_METADATA, each) for each in (address, *embedded(address)))


def is_public(address: Address) -> bool:
    """Say whether this is an address of the public Internet, and so are those that it embeds."""
    inner = embedded(address)
    if inner:
        return all(is_public(each) for each in inner)
    if contains(_METADATA, address):
        return False
    if isinstance(address, IPv6Address) and address not in _GLOBAL6:
        return False
    return contains(_REACHABLE, address) or not contains(_PRIVATE, address)


def is_own(address: Address) -> bool:
    """Say whether the host itself has this address, by the kernel's routes of this moment.

    A datagram socket tells without sending anything, in two ways. Connected to a local address, it
    has that address itself. And it can be bound to local addresses only, unless
    ``ip_nonlocal_bind`` is on; this also finds all addresses of a range that is local as a whole.
    """
    return _answers_itself(address) or (_binds(address) and not _binds(_NOBODY[address.version]))


def _answers_itself(address: Address) -> bool:
    try:
        with socket.socket(_FAMILY[address.version], socket.SOCK_DGRAM) as sock:
            sock.connect((str(address), DNS_PORT))
            return ip_address(sock.getsockname()[0].partition("%")[0]) == address
    except OSError as exc:
        # Without a route there is nothing to protect; without a descriptor nobody knows.
        return exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def _binds(address: Address) -> bool:
    try:
        with socket.socket(_FAMILY[address.version], socket.SOCK_DGRAM) as sock:
            sock.bind((str(address), 0))
            return True
    except OSError:
        return False
