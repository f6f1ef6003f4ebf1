"""HTTP requests: the only module that talks to httpx, and knows its exceptions."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final, final

import httpx
import trio

from ..._version import __version__
from ...errors import ConfigError, RegistryError
from ..names import show_text
from .retry import Transient, parse_retry_after
from .tls import Contexts

#: Bytes that count as an advance, of a connection or of a blob.
ADVANCE: Final = 1024
_READ_STALLS: Final = 20  # a whole document may take so many stall timeouts
_HEADERS: Final = {
    "User-Agent": f"trio-supermachine/{__version__}",
    # Digests are those of the bytes in the registry, not of a server's compression of these.
    "Accept-Encoding": "identity",
}


@final
class Answer:
    """An HTTP answer whose body has not been read. Its owner closes it in any case."""

    def __init__(self, response: httpx.Response, stall_timeout: float) -> None:
        self.status: int = response.status_code
        self.url: httpx.URL = response.url
        self._response = response
        self._chunks = response.aiter_raw()
        self._stall_timeout = stall_timeout
        self._patience = stall_timeout
        self._got = 0

    def header(self, name: str) -> str | None:
        """Give a header's value. Several headers of that name are joined by commas."""
        value: str | None = self._response.headers.get(name)
        return value

    def headers(self, name: str) -> list[str]:
        """Give all values of a header."""
        return self._response.headers.get_list(name)

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asks to wait."""
        return parse_retry_after(self.header("Retry-After"))

    @property
    def reason(self) -> str:
        """The status for people."""
        return f"{self.status} {show_text(self._response.reason_phrase, 64)}".rstrip()

    async def receive(self) -> bytes:
        """Wait for the next bytes of the body, as they come; none at its end.

        :raises Transient: the connection is lost, or brings next to nothing.
        """
        began = trio.current_time()
        # Patience may be below zero, after bytes that came at the very moment when it ended.
        with trio.move_on_after(max(0.0, self._patience)) as scope, _translated(self.url):
            chunk = await anext(self._chunks, b"")
            self._got += len(chunk)
            if self._got >= ADVANCE:
                self._got, self._patience = 0, self._stall_timeout
            else:  # the caller's time between two calls does not count
                self._patience -= trio.current_time() - began
            return chunk
        assert scope.cancelled_caught
        raise _stalled(self.url, self._stall_timeout)

    async def read(self, limit: int) -> bytes | None:
        """Read the whole body; ``None`` if it has more than ``limit`` bytes.

        :raises Transient: as for :meth:`receive`, or the body takes too long.
        """
        body = bytearray()
        with trio.move_on_after(_READ_STALLS * self._stall_timeout):
            while chunk := await self.receive():
                body += chunk
                if len(body) > limit:
                    return None
            return bytes(body)
        raise _stalled(self.url, _READ_STALLS * self._stall_timeout)

    async def aclose(self) -> None:
        """Close the connection; or leave it for the next request, if all has been read."""
        with trio.CancelScope(shield=True) as scope:
            # httpx nests async generators. Only an exception from the innermost ends all of them
            # at once; else the garbage collector would complain about the others.
            scope.cancel()
            try:
                async for _ in self._chunks:
                    pass
            except (httpx.HTTPError, httpx.StreamError):
                pass
        with trio.CancelScope(shield=True):
            await self._response.aclose()


@final
class Wire:
    """The connections of one endpoint: its own, and those to servers that it redirects to."""

    def __init__(
        self, own: httpx.AsyncClient, others: httpx.AsyncClient, stall_timeout: float
    ) -> None:
        self._own = own
        self._others = others
        self._stall_timeout = stall_timeout

    async def send(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str],
        *,
        own: bool,
        form: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request, and receive the head of its answer, which may be a redirect.

        :param own: whether ``url`` is the endpoint's own, or where it has redirected to.
        :raises Transient: no answer came.
        :raises RegistryError: no answer can come, for example since a certificate is not trusted.
        """
        client = self._own if own else self._others
        with trio.move_on_after(self._stall_timeout) as scope, _translated(url):
            async with _no_half_made() as extensions:
                request = client.build_request(
                    method, url, headers=headers, data=form, extensions=extensions
                )
                return Answer(await client.send(request, stream=True), self._stall_timeout)
        assert scope.cancelled_caught
        raise _stalled(url, self._stall_timeout)


@asynccontextmanager
async def open_wire(
    contexts: Contexts, *, stall_timeout: float, loopback: bool
) -> AsyncIterator[Wire]:
    """Open connections on demand, and close them when the block ends.

    Proxies are taken from the environment, but not for a ``loopback`` endpoint.

    :raises ConfigError: the environment names an impossible proxy.
    """
    clients: list[httpx.AsyncClient] = []
    try:
        for context in (contexts.own, contexts.others):
            clients.append(_client(context, trust_env=not loopback))
        yield Wire(clients[0], clients[1], stall_timeout)
    finally:
        with trio.CancelScope(shield=True):
            for client in clients:
                await client.aclose()


def _client(context: ssl.SSLContext, *, trust_env: bool) -> httpx.AsyncClient:
    try:
        client = httpx.AsyncClient(
            verify=context,
            trust_env=trust_env,
            headers=_HEADERS,
            timeout=None,  # all waits have deadlines of Trio's
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
            follow_redirects=False,
        )
    except (ValueError, ImportError, httpx.InvalidURL) as exc:
        raise ConfigError(f"the environment's proxy cannot be used: {exc}") from exc
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))  # keep none
    return client


@asynccontextmanager
async def _no_half_made() -> AsyncIterator[dict[str, Any]]:
    """Give a request's extensions that close the connections that it opened, if it fails.

    httpcore forgets a connection's socket when its TLS handshake is cancelled.
    """
    opened: list[Any] = []

    async def note(event: str, about: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            opened.append(about["return_value"])

    try:
        yield {"trace": note}
    except BaseException:
        with trio.CancelScope(shield=True):
            for stream in opened:
                await stream.aclose()
        raise


@contextmanager
def _translated(url: httpx.URL) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as exc:
        raise _failure(url, exc) from exc
    except (httpx.InvalidURL, httpx.StreamError, UnicodeError, ValueError) as exc:
        raise RegistryError(
            f"{url.host} cannot be asked: {show_text(str(exc))}", registry=authority(url)
        ) from exc


def authority(url: httpx.URL) -> str:
    """Give the ``HOST[:PORT]`` of an address."""
    return url.netloc.decode("ascii", "replace")


def speaks_no_tls(failure: Transient) -> bool:
    """Give whether a failure is due to a peer that answers TLS with something else."""
    return any(
        isinstance(cause, ssl.SSLError)
        and cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")
        for cause in _causes(failure)
    )


def _failure(url: httpx.URL, exc: httpx.HTTPError) -> Exception:
    host = authority(url)
    for cause in _causes(exc):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RegistryError(
                f"{host} has a certificate that is not trusted here"
                f" ({show_text(cause.verify_message)}): if it is right, put its authority's into"
                f" ~/.config/containers/certs.d/{host}/ca.crt",
                registry=host,
            )
    said = show_text(str(exc)) or type(exc).__name__
    if isinstance(exc, httpx.ProxyError):
        return _unreachable(
            host, f"through the proxy ({said}); check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
        )
    if isinstance(exc, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return RegistryError(f"{host} cannot be asked: {said}", registry=host)
    if isinstance(exc, httpx.ConnectError):
        return _unreachable(host, f"({said}); check its name, the network and HTTPS_PROXY")
    return Transient(
        RegistryError(
            f"{host} broke the connection ({said}); check its name and the network", registry=host
        )
    )


def _unreachable(host: str, why: str) -> Transient:
    what = f"cannot be reached {why}"
    return Transient(RegistryError(f"{host} {what}", registry=host), unreachable=what)


def _stalled(url: httpx.URL, seconds: float) -> Transient:
    host = authority(url)
    return Transient(
        RegistryError(f"{host} sent next to nothing for {seconds:g} s; try later", registry=host)
    )


def _causes(exc: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = exc
    for _ in range(16):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__
