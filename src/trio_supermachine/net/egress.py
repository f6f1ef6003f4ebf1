"""The way out of a guest: decide, connect, relay.

A guest has no network device. A hook in its kernel turns each address that a program connects or
sends to into one on the guest's loopback, where the agent takes the connection over. For each TCP
connection, and for each pair of UDP addresses, the agent connects to the host and sends OPEN: a
protocol, an address, a port. This module serves these connections, each in a task of its own::

    undecided ── OPEN to the resolver ──▶ resolving ──────────────────────────▶ closed
    │     │                                                                     ▲
    │     └───── OPEN, allowed ──▶ connecting ──▶ relaying ─────────────────────┤
    │                 │                │                                        │
    │                 └── refused ─────┴── failed ── ERROR with an errno ───────┤
    └── nothing within 5 s, or nonsense ──── reset ─────────────────────────────┘

- *undecided*: exactly the bytes of one OPEN are read, since the program's own bytes may follow at
  once. 256 connections at most are in this state; the next is reset as it comes.
- *resolving*: OPEN to 192.0.0.1, port 53. :mod:`.resolver` answers. 320 connections at most, and 64
  questions at once.
- *connecting*: :mod:`.decisions` has allowed it, and the host connects, for 30 s at most. A guest
  that leaves meanwhile ends that. An address that stands for the host's loopback is tried as
  127.0.0.1 and as ::1. The policy's limit of connections counts from here.
- *relaying*: OK has gone out, and bytes (:mod:`.relay`) or datagrams (:mod:`.flows`) go both ways,
  at the policy's rate.

The guest is not trusted, neither its programs nor its agent and kernel: nothing that they say about
themselves counts. The decision is made here for each connection, on the address that the host then
connects to itself. No name is looked up again in between, so no second answer can differ from the
one that was decided on (:mod:`.names`). What a guest holds of the host is bounded by the numbers
above, by the policy's, and by the windows of its connections.

Each decision about a connection or a name is an :class:`EgressEvent`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final, final

import trio

from .._util.trace import trace
from ..agent import wire
from ..agent.wire import FrameType, Protocol, WireError
from ..vsock.stream import VsockStream
from .addresses import DNS_PORT, RESOLVER, Address, is_host, is_own
from .decisions import Decision, decide
from .events import MAX_BUFFER, EgressEvent, EventFeed
from .flows import receive_exactly, relay_datagrams, serve_dns_datagrams, serve_dns_stream
from .names import ToldNames
from .policy import EgressPolicy
from .rate import PacedStream, TokenBucket
from .relay import relay

if TYPE_CHECKING:
    from .lookup import HostLookups
    from .resolver import Resolver

#: Seconds for a connection to send OPEN, and for the guest to take the answer.
OPEN_TIMEOUT: Final = 5.0
#: Seconds for the real connection.
CONNECT_TIMEOUT: Final = 30.0
#: Connections at once that have not sent OPEN yet.
MAX_UNDECIDED: Final = 256
#: Connections to the resolver at once.
MAX_RESOLVING: Final = 320
#: Questions of one VM at once.
MAX_QUESTIONS: Final = 64

_LOOPBACK4: Final = IPv4Address("127.0.0.1")
_LOOPBACK6: Final = IPv6Address("::1")

_OPEN_PAYLOAD: Final = 24
_OPEN_HEADER: Final = struct.pack("<IBBH", _OPEN_PAYLOAD, FrameType.OPEN, 0, 0)

#: Errors that end one connection and nothing more.
_CONNECTION_ERRORS: Final = (WireError, trio.BrokenResourceError, trio.ClosedResourceError)


@final
class EgressServer:
    """The server of one VM's way out.

    :param listener: takes the agent's connections; :meth:`run` closes it.
    :param lookups: asks the host about names.
    """

    def __init__(
        self,
        listener: trio.abc.Listener[VsockStream],
        policy: EgressPolicy,
        *,
        lookups: HostLookups | None = None,
    ) -> None:
        self._listener = listener
        self._policy = policy
        self._names = ToldNames()
        self._feed = EventFeed()
        self._lookups = lookups
        self._resolver: Resolver | None = None
        self._questions = trio.Semaphore(MAX_QUESTIONS)
        rate = policy.bytes_per_second
        self._bucket = None if rate is None else TokenBucket(rate)
        self._undecided = 0
        self._resolving = 0
        self._connections = 0

    def subscribe(self, max_buffer: int = MAX_BUFFER) -> trio.MemoryReceiveChannel[EgressEvent]:
        """Give a channel of the decisions from now on; it ends with :meth:`run`.

        :param max_buffer: the number of events that wait for the reader. Of more, the oldest are
            lost, and counted in :attr:`EgressEvent.missed`; the guest never waits.
        :raises ConfigError: ``max_buffer`` is no integer above 0.
        """
        return self._feed.subscribe(max_buffer)

    async def run(self) -> None:
        """Serve until the machine ends, or this is cancelled, and leave nothing open."""
        try:
            async with trio.open_nursery() as nursery:
                await self._accept(nursery)
                nursery.cancel_scope.cancel()
        finally:
            self._feed.close()
            with trio.CancelScope(shield=True):  # nothing in it waits
                await trio.aclose_forcefully(self._listener)

    async def _accept(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                stream = await self._listener.accept()
            except _CONNECTION_ERRORS:
                return
            if self._undecided >= MAX_UNDECIDED:
                stream.abort()
                continue
            self._undecided += 1
            nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: VsockStream) -> None:
        try:
            wanted = None
            try:
                with trio.move_on_after(OPEN_TIMEOUT):
                    wanted = await _read_open(stream)
            finally:
                self._undecided -= 1
            if wanted is None:
                trace("net", "%r did not say what it is for", stream)
            elif wanted.address == RESOLVER and wanted.port == DNS_PORT:
                await self._resolve(stream, wanted)
            else:
                await self._open(stream, wanted)
        except (OSError, *_CONNECTION_ERRORS) as exc:
            trace("net", "%r: %s", stream, exc)
        finally:
            stream.abort()

    async def _resolve(self, stream: VsockStream, wanted: wire.Open) -> None:
        if self._resolving >= MAX_RESOLVING:
            await _refuse(stream, errno.EAGAIN, "too many connections to the resolver")
            return
        self._resolving += 1
        try:
            if not await _accept_open(stream):
                return
            resolver = await self._load_resolver()
            if wanted.protocol is Protocol.UDP:
                await serve_dns_datagrams(stream, resolver, self._questions)
            else:
                await serve_dns_stream(stream, resolver, self._questions)
        finally:
            self._resolving -= 1
        await stream.aclose()

    async def _load_resolver(self) -> Resolver:
        """Give the VM's resolver, made when its guest asks for the first time."""
        if self._resolver is None:
            # In a thread: the import takes too long for a loop that serves other VMs. Not one of
            # Trio's default limiter, for the same reason as lookups.
            limiter = trio.CapacityLimiter(1)
            resolver, lookups = await trio.to_thread.run_sync(_import_resolver, limiter=limiter)
            if self._resolver is None:
                self._resolver = resolver(
                    self._policy, self._names, self._lookups or lookups(), self._report_question
                )
        return self._resolver

    async def _open(self, stream: VsockStream, wanted: wire.Open) -> None:
        decision, error = self._decide(wanted)
        self._report(wanted, decision)
        if not decision.allowed:
            await _refuse(stream, error, decision.reason)
            return
        if wanted.protocol is Protocol.TCP:
            stream.end_like_tcp()
        self._names.use(wanted.address, trio.current_time())
        self._connections += 1
        try:
            try:
                peer = await _connect(stream, wanted)
            except OSError as exc:
                await _refuse(stream, exc.errno or errno.EIO, exc.strerror or str(exc))
                return
            if peer is not None:
                await self._relay(stream, wanted, peer)
        finally:
            self._connections -= 1

    async def _relay(
        self, stream: VsockStream, wanted: wire.Open, peer: trio.socket.SocketType
    ) -> None:
        with peer:
            if not await _accept_open(stream):
                return
            if wanted.protocol is Protocol.UDP:
                await relay_datagrams(stream, peer, self._bucket)
                await stream.aclose()
            elif self._bucket is None:
                await relay(stream, trio.SocketStream(peer))
            else:
                await relay(PacedStream(stream, self._bucket), trio.SocketStream(peer))

    def _decide(self, wanted: wire.Open) -> tuple[Decision, int]:
        """Decide, and give the errno of a refusal, too."""
        address = wanted.address
        decision = decide(
            self._policy,
            address,
            wanted.port,
            listed=self._names.listed(address, trio.current_time()),
            own=is_own,
        )
        limit = self._policy.connections
        if decision.allowed and self._connections >= limit:
            return Decision(False, f"the limit of {limit} connections is reached"), errno.EAGAIN
        return decision, errno.EACCES

    def _report(self, wanted: wire.Open, decision: Decision) -> None:
        trace(
            "net",
            "%s to %s port %d %s: %s",
            wanted.protocol.name,
            wanted.address,
            wanted.port,
            "allowed" if decision.allowed else "refused",
            decision.reason,
        )
        self._feed.publish(
            EgressEvent(
                allowed=decision.allowed,
                protocol="tcp" if wanted.protocol is Protocol.TCP else "udp",
                address=str(wanted.address),
                port=wanted.port,
                host=self._names.name(wanted.address, trio.current_time()),
                reason=decision.reason,
            )
        )

    def _report_question(self, decision: Decision, name: str) -> None:
        word = "allowed" if decision.allowed else "refused"
        trace("net", "name %s %s: %s", name, word, decision.reason)
        self._feed.publish(
            EgressEvent(
                allowed=decision.allowed,
                protocol="dns",
                address=None,
                port=DNS_PORT,
                host=name,
                reason=decision.reason,
            )
        )


def _import_resolver() -> tuple[type[Resolver], type[HostLookups]]:
    # With dnspython, a tenth of what a short run would import, for guests that ask for names.
    from .lookup import HostLookups
    from .resolver import Resolver

    return Resolver, HostLookups


async def _read_open(stream: VsockStream) -> wire.Open | None:
    """Read OPEN; ``None`` if the connection ends before. :raises WireError: it is none."""
    # A frame of another type may be large: it is refused by its header.
    raw = await receive_exactly(stream, len(_OPEN_HEADER) + _OPEN_PAYLOAD)
    if raw is None:
        return None
    if not raw.startswith(_OPEN_HEADER):
        raise WireError("something else in the place of an OPEN")
    wanted = wire.Open.decode(raw[len(_OPEN_HEADER) :])
    if not wanted.port:
        raise WireError("an OPEN of port 0")
    return wanted


async def _accept_open(stream: VsockStream) -> bool:
    """Say that the connection is made. Return whether the guest has taken the answer in time."""
    with trio.move_on_after(OPEN_TIMEOUT):
        await stream.send_all(wire.ok())
        return True
    return False


async def _refuse(stream: VsockStream, error: int, message: str) -> None:
    """Say why there is no connection, if there is room for the answer, and leave."""
    if stream.sendable():
        stream.send_nowait(wire.error(error, message))
    await stream.aclose()


async def _connect(stream: VsockStream, wanted: wire.Open) -> trio.socket.SocketType | None:
    """Make the real connection; ``None`` if the guest leaves meanwhile.

    :raises OSError: it cannot be made.
    """
    scope = trio.CancelScope()

    def changed() -> None:
        if stream.ended and not stream.sendable():
            scope.cancel()

    stream.watch(changed)
    try:
        with scope, trio.fail_after(CONNECT_TIMEOUT):
            return await _connect_any(wanted)
    except trio.TooSlowError:
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
    finally:
        stream.watch(lambda: None)
    return None


async def _connect_any(wanted: wire.Open) -> trio.socket.SocketType:
    targets = [wanted.address]
    if is_host(wanted.address):
        targets = [_LOOPBACK4, _LOOPBACK6]
        if wanted.address.version == 6:
            targets.reverse()
    kind = socket.SOCK_STREAM if wanted.protocol is Protocol.TCP else socket.SOCK_DGRAM
    *others, last = targets
    for target in others:
        # A service on the host's loopback may listen on one of its two addresses only.
        with suppress(ConnectionRefusedError):
            return await _connect_one(target, wanted.port, kind)
    return await _connect_one(last, wanted.port, kind)


async def _connect_one(
    address: Address, port: int, kind: socket.SocketKind
) -> trio.socket.SocketType:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = trio.socket.socket(family, kind)
    try:
        await sock.connect((str(address), port))
    except BaseException:
        sock.close()
        raise
    return sock
