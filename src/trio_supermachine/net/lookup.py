"""Lookups on the host: its own resolver, and its name servers."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from typing import Any, Final, TypeVar, final

import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import trio

from .._util.trace import trace
from .addresses import DNS_PORT, Address, unmapped
from .nameserver import MAX_DATAGRAM, ask

#: Threads of the host that lookups of one VM take at once, those of cancelled ones included.
MAX_THREADS: Final = 8

_T = TypeVar("_T")

_RESOLV_CONF: Final = "/etc/resolv.conf"
_MAX_SERVERS: Final = 3  # as resolv.conf(5) has it
_ATTEMPT: Final = 2.0  # seconds for one name server
_ANSWERS: Final = (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)


class LookupFailed(Exception):
    """Failure of a question: there is no answer for now."""


class NoSuchName(Exception):
    """Answer to a question: there is no such name."""


@final
class HostLookups:
    """The lookups of one VM, which ask as the host's own programs would.

    Addresses come from ``getaddrinfo``, so that the host's files, search list and so on count. A
    resolver set by :func:`trio.socket.set_custom_hostname_resolver` takes its place.

    :param name_servers: an async function that gives the addresses and ports of name servers for
        :meth:`query`; ``None`` reads the host's ``/etc/resolv.conf``.
    """

    def __init__(
        self, name_servers: Callable[[], Awaitable[Sequence[tuple[str, int]]]] | None = None
    ) -> None:
        # Not Trio's default limiter: a guest that asks for names whose servers are silent must
        # not hold the threads that the host program needs.
        self._threads = trio.CapacityLimiter(MAX_THREADS)
        self._parsing = trio.CapacityLimiter(1)
        self._name_servers = name_servers or host_name_servers

    async def addresses(self, name: str) -> list[Address]:
        """Look up all addresses of ``name``, the preferred first; there may be none.

        Cancelled, it leaves its thread to end by itself.

        :raises NoSuchName: there is no such name.
        :raises LookupFailed: nobody can tell now.
        """
        host = name.encode("ascii")
        custom = _custom_resolver()
        try:
            if custom is not None:
                found: Sequence[Any] = await custom.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            else:
                found = await self._in_thread(
                    lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                )
        except OSError as exc:
            if _means_no_data(exc):
                return []
            raise _failure(exc) from exc
        return list(dict.fromkeys(_address(entry[4]) for entry in found))

    async def name_of(self, address: Address) -> str:
        """Look up the name of ``address``. Errors are those of :meth:`addresses`."""
        where = (str(address), 0)
        flags = socket.NI_NAMEREQD | socket.NI_DGRAM
        custom = _custom_resolver()
        try:
            if custom is not None:
                return (await custom.getnameinfo(where, flags))[0]
            return (await self._in_thread(lambda: socket.getnameinfo(where, flags)))[0]
        except OSError as exc:
            raise NoSuchName if _means_no_data(exc) else _failure(exc) from exc

    async def query(
        self, name: dns.name.Name, kind: dns.rdatatype.RdataType
    ) -> dns.message.Message:
        """Ask the host's name servers, one after the other, and give the first answer.

        :raises LookupFailed: none of them answers.
        """
        try:
            servers = await self._name_servers()
        except RuntimeError as exc:  # the system has no thread that reads a file
            raise LookupFailed(str(exc)) from exc
        for server, port in servers:
            question = dns.message.make_query(name, kind, use_edns=0, payload=MAX_DATAGRAM)
            try:
                with trio.fail_after(_ATTEMPT):
                    answer = await ask(question, server, port, self._parsing)
            except (OSError, ValueError, trio.BrokenResourceError, trio.TooSlowError) as exc:
                trace("net", "name server %s: %r", server, exc)
                continue
            if answer.rcode() in _ANSWERS:
                return answer
        raise LookupFailed("no name server answers")

    async def _in_thread(self, ask: Callable[[], _T]) -> _T:
        try:
            return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=self._threads)
        except RuntimeError as exc:  # the system has no thread for it
            raise LookupFailed(str(exc)) from exc


async def host_name_servers() -> list[tuple[str, int]]:
    """Give the host's name servers, as its ``/etc/resolv.conf`` has them now."""
    try:
        text = await trio.Path(_RESOLV_CONF).read_text(errors="replace")
    except OSError:
        text = ""
    return read_name_servers(text)


def read_name_servers(text: str) -> list[tuple[str, int]]:
    """Give the addresses on the ``nameserver`` lines of a ``resolv.conf``."""
    servers: list[tuple[str, int]] = []
    for line in text.splitlines():
        match line.split():
            case ["nameserver", address, *_]:
                try:
                    ip_address(address)
                except ValueError:
                    continue
                servers.append((address, DNS_PORT))
    return servers[:_MAX_SERVERS]


def _custom_resolver() -> trio.abc.HostnameResolver | None:
    # Trio tells which one is set only by setting another.
    custom = trio.socket.set_custom_hostname_resolver(None)
    trio.socket.set_custom_hostname_resolver(custom)
    return custom


def _address(where: Any) -> Address:
    return unmapped(ip_address(str(where[0]).partition("%")[0]))


# Not every libc has these.
_NO_DATA = {getattr(socket, name, None) for name in ("EAI_NODATA", "EAI_ADDRFAMILY")} - {None}


def _means_no_data(exc: OSError) -> bool:
    return isinstance(exc, socket.gaierror) and exc.errno in _NO_DATA


def _failure(exc: OSError) -> Exception:
    if isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_NONAME:
        return NoSuchName()
    return LookupFailed(exc.strerror or str(exc))
