"""TLS in front of a guest: its configuration, and a stream whose halves end apart."""

from __future__ import annotations

import operator
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, final

import attrs
import trio

from .._public import public
from .._util import validators as check
from .._util.conflict import OneAtATime
from .._util.validators import MAX_PORT
from ..errors import ConfigError
from .relay import reset_socket

#: Seconds for a client's handshake.
HANDSHAKE: Final = 10.0

_RECEIVE: Final = 65536
_PIECE: Final = 65536  # encrypted before it is sent

_MAX_ALPN: Final = 255  # RFC 7301, 3.1: a name has one byte of length


def _address(value: Any) -> tuple[str, int]:
    match value:
        case (str(host), int(port)) if host and 0 <= port <= MAX_PORT:
            return host, port
    raise ConfigError(f"listen_addr must be an address and a port, not {value!r}")


def _alpn(values: Any) -> tuple[str, ...]:
    if isinstance(values, str):
        raise ConfigError(f"alpn must be a sequence of names, not one: {values!r}")
    try:
        names = tuple(values)
    except TypeError:
        raise ConfigError(f"alpn must be a sequence of names, not {values!r}") from None
    for name in names:
        if not isinstance(name, str) or not name.isascii() or not 0 < len(name) <= _MAX_ALPN:
            raise ConfigError(f"an ALPN name is 1 to 255 ASCII characters, not {name!r}")
    return names


@public
@attrs.frozen
class TlsConfig:
    """The address and the certificate of :meth:`Vm.expose_tls`. All files are PEM.

    :ivar listen_addr: the host's address and port; port 0 is a free one.
    :ivar certificate: the server's certificate, followed by those between it and its CA.
    :ivar key: the certificate's private key, not encrypted.
    :ivar client_ca: certificates of CAs; then each client must have a certificate of one of them.
    :ivar alpn: names of protocols for ALPN, the preferred first. A client that offers none of them
        is served all the same, with none agreed on.
    :ivar guest_port: the guest's port; 0 is that of its first listener.
    :raises ConfigError: a value makes no sense.
    """

    listen_addr: tuple[str, int] = attrs.field(default=("127.0.0.1", 0), converter=_address)
    certificate: Path = attrs.field(converter=check.host_path, kw_only=True)
    key: Path = attrs.field(converter=check.host_path, kw_only=True)
    client_ca: Path | None = attrs.field(
        default=None, converter=attrs.converters.optional(check.host_path), kw_only=True
    )
    alpn: tuple[str, ...] = attrs.field(default=(), converter=_alpn, kw_only=True)
    guest_port: int = attrs.field(default=0, kw_only=True)

    @guest_port.validator
    def _check_guest_port(self, field: object, value: int) -> None:
        check.port("guest_port", value)


async def load_context(config: TlsConfig) -> ssl.SSLContext:
    """Read the files of a configuration, in a thread.

    :raises ConfigError: a file is not the PEM that it should be; the message names it.
    :raises OSError: one cannot be read.
    """
    return await trio.to_thread.run_sync(_load_context, config)


def _load_context(config: TlsConfig) -> ssl.SSLContext:
    for file in (config.certificate, config.key, config.client_ca):
        if file is not None:
            with file.open("rb"):  # the errors of ssl do not name the file
                pass
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    _load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), config.certificate)

    def refuse_password() -> NoReturn:
        raise ConfigError(f"the key {config.key} is encrypted; give one that is not")

    try:
        context.load_cert_chain(config.certificate, config.key, refuse_password)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            why = f"the key {config.key} is not that of the certificate {config.certificate}"
        else:
            why = f"{config.key} is no private key in PEM: {exc.reason or exc}"
        raise ConfigError(why) from exc
    if config.client_ca is not None:
        _load_certificates(context, config.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    if config.alpn:
        context.set_alpn_protocols(list(config.alpn))
    return context


def _load_certificates(context: ssl.SSLContext, file: Path) -> None:
    try:
        context.load_verify_locations(file)
    except ssl.SSLError as exc:
        raise ConfigError(f"{file} holds no certificate in PEM: {exc.reason or exc}") from exc


@final
class TlsStream(trio.abc.HalfCloseableStream):
    """One side of a TLS connection, each of whose directions ends by its own close_notify.

    RFC 8446, 6.1, lets the directions end apart; :class:`trio.SSLStream` cannot receive any more
    once it has sent its close_notify. An end without close_notify is
    :exc:`trio.BrokenResourceError`, since somebody may have cut the connection.

    :param server_hostname: the name of the server that this client expects; ``None`` makes this
        side the server.
    """

    def __init__(
        self,
        transport: trio.SocketStream,
        context: ssl.SSLContext,
        *,
        server_hostname: str | None = None,
    ) -> None:
        self._transport = transport
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_hostname is None,
            server_hostname=server_hostname,
        )
        self._early = bytearray()  # decrypted before anybody asked for it
        self._ended = False  # by send_eof
        self._broken = False
        self._sending = OneAtATime("another task is sending on this stream")
        self._receiving = OneAtATime("another task is receiving on this stream")
        self._flushing = trio.StrictFIFOLock()

    @property
    def protocol(self) -> str | None:
        """The protocol that ALPN agreed on."""
        return self._tls.selected_alpn_protocol()

    async def shake_hands(self, seconds: float = HANDSHAKE) -> None:
        """Make the handshake, before anything else.

        :raises trio.TooSlowError: the peer took longer than ``seconds``.
        :raises trio.BrokenResourceError: it went away, or there is no agreement with it.
        """
        with self._sending, self._receiving, trio.fail_after(seconds):
            try:
                while not self._attempt(self._tls.do_handshake):
                    await self._flush()
                    await self._fill()
            finally:
                await self._flush()  # also an alert, which tells the peer what is wrong

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``. Cancelled, it leaves a broken stream."""
        with self._sending:
            self._check_open()
            if self._ended:
                raise trio.ClosedResourceError("send_eof was called on this stream")
            with memoryview(data).cast("B") as view:
                for start in range(0, len(view), _PIECE):
                    piece = view[start : start + _PIECE]
                    self._attempt(partial(self._tls.write, piece))
                    await self._flush()
            await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        with self._sending:
            await self._transport.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Send close_notify; receiving goes on. Idempotent."""
        with self._sending:
            self._check_open()
            if not self._ended:
                self._ended = True
                # OpenSSL looks for the peer's close_notify in unwrap, and fails if it finds data
                # instead.
                while data := self._read(_PIECE):
                    self._early += data
                self._attempt(self._tls.unwrap)
                await self._flush()
            await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive up to ``max_bytes`` of data; ``b""`` is the peer's close_notify."""
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        size = min(max_bytes or _RECEIVE, _RECEIVE)
        with self._receiving:
            self._check_open()
            await trio.lowlevel.checkpoint()
            if self._early:
                data = bytes(self._early[:size])
                del self._early[:size]
                return data
            while (received := self._read(size)) is None:
                await self._flush()
                await self._fill()
            return received

    def _read(self, size: int) -> bytes | None:
        """Decrypt what is here; ``b""`` at the peer's end, ``None`` if more has to come first."""
        try:
            return self._tls.read(size)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLZeroReturnError:
            return b""
        except ssl.SSLError as exc:
            raise self._break(exc) from exc

    def _attempt(self, step: Callable[[], object]) -> bool:
        """Take a step. Return false if it needs more data of the peer."""
        try:
            step()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as exc:
            raise self._break(exc) from exc
        return True

    def _break(self, exc: ssl.SSLError) -> trio.BrokenResourceError:
        self._broken = True
        return trio.BrokenResourceError(f"TLS: {exc.reason or exc}")

    async def _flush(self) -> None:
        """Send what was encrypted, in order."""
        if not self._outgoing.pending:
            return
        async with self._flushing:
            data = self._outgoing.read()
            if not data:
                return
            try:
                await self._transport.send_all(data)
            except BaseException:
                self._broken = True
                raise

    async def _fill(self) -> None:
        data = await self._transport.receive_some(_RECEIVE)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _check_open(self) -> None:
        if self._transport.socket.fileno() == -1:
            raise trio.ClosedResourceError("this stream is closed")
        if self._broken:
            raise trio.BrokenResourceError("TLS has failed on this stream")

    async def aclose(self) -> None:
        """Send close_notify and leave; data that was not read is lost. Cancelled, just leave."""
        try:
            if self._transport.socket.fileno() != -1 and not (self._ended or self._broken):
                with suppress(trio.BrokenResourceError, trio.BusyResourceError):
                    await self.send_eof()
        finally:
            await trio.aclose_forcefully(self._transport)
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Leave by a reset of the connection. Plain."""
        reset_socket(self._transport)
