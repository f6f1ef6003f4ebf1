"""TLS in front of a guest: the configuration, and a stream whose halves can be closed."""

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
    """How :meth:`Vm.expose_tls` listens, and who it says it is. Files are PEM.

    :raises ConfigError: a value makes no sense.
    """

    #: The host's address and port; port 0 is a free one.
    listen_addr: tuple[str, int] = attrs.field(default=("127.0.0.1", 0), converter=_address)
    #: The server's certificate, and those between it and its CA.
    certificate: Path = attrs.field(converter=check.host_path, kw_only=True)
    #: Its private key, not encrypted.
    key: Path = attrs.field(converter=check.host_path, kw_only=True)
    #: Certificates of CAs; then a client must have a certificate of one of them.
    client_ca: Path | None = attrs.field(
        default=None, converter=attrs.converters.optional(check.host_path), kw_only=True
    )
    #: Names of protocols for ALPN, the preferred first. A client that offers none of them is
    #: served all the same, with none agreed on.
    alpn: tuple[str, ...] = attrs.field(default=(), converter=_alpn, kw_only=True)
    #: The guest's port; 0 is that of its first listener.
    guest_port: int = attrs.field(default=0, kw_only=True)

    @guest_port.validator
    def _check_guest_port(self, field: object, value: int) -> None:
        check.port("guest_port", value)


async def load_context(config: TlsConfig) -> ssl.SSLContext:
    """Read the files, in a thread. :raises ConfigError: one is no such PEM; it names the file.

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

    It is a server's, unless it is told which server it shall find.

    RFC 8446, 6.1, has it so; :class:`trio.SSLStream` cannot go on receiving once it has said
    its end. An end without close_notify is :exc:`trio.BrokenResourceError`: somebody may have
    cut the connection.
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
        self._early = bytearray()  # what was decrypted before anybody asked for it
        self._ended = False  # by send_eof
        self._broken = False
        self._sending = OneAtATime("another task is sending on this stream")
        self._receiving = OneAtATime("another task is receiving on this stream")
        self._flushing = trio.StrictFIFOLock()

    @property
    def protocol(self) -> str | None:
        """What ALPN agreed on."""
        return self._tls.selected_alpn_protocol()

    async def shake_hands(self, seconds: float = HANDSHAKE) -> None:
        """Agree with the peer; before anything else.

        :raises trio.TooSlowError: the peer took longer than this.
        :raises trio.BrokenResourceError: it went away, or is not one we talk to.
        """
        with self._sending, self._receiving, trio.fail_after(seconds):
            try:
                while not self._attempt(self._tls.do_handshake):
                    await self._flush()
                    await self._fill()
            finally:
                await self._flush()  # also the alert that says what was wrong

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As :class:`trio.abc.SendStream` has it. Cancelled, it leaves a stream of no use."""
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
                # OpenSSL looks for the peer's own close_notify meanwhile, and takes data that
                # it finds there for a fault.
                while data := self._read(_PIECE):
                    self._early += data
                self._attempt(self._tls.unwrap)
                await self._flush()
            await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As :class:`trio.abc.ReceiveStream` has it; empty after the peer's close_notify."""
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
        """What can be decrypted; empty at the peer's end, ``None`` if more has to come first."""
        try:
            return self._tls.read(size)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLZeroReturnError:
            return b""
        except ssl.SSLError as exc:
            raise self._break(exc) from exc

    def _attempt(self, step: Callable[[], object]) -> bool:
        """Take a step; false if data of the peer is needed to complete it."""
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
        """Send what there is to send, in the order in which it was encrypted."""
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
        """Leave, after close_notify. What was not read is lost. Cancelled, it just leaves."""
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
