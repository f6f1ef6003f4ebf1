"""An HTTP server on loopback whose every byte is a test's own."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from urllib.parse import parse_qs, urlsplit

import attrs
import trio


@attrs.frozen
class Request:
    """A request; the names of :attr:`headers` are in lower case, :attr:`at` is Trio's time."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.target).query).items()}


Handler = Callable[[Request, trio.abc.Stream], Awaitable[None]]


@attrs.define
class HostileServer:
    """A running server: ``host`` is ``127.0.0.1:PORT``."""

    host: str
    handler: Handler
    requests: list[Request] = attrs.Factory(list)

    def of(self, text: str) -> list[Request]:
        """The requests whose target contains ``text``."""
        return [request for request in self.requests if text in request.target]

    async def serve(self, stream: trio.abc.Stream) -> None:
        async with stream:
            try:
                request = await _receive(stream)
                if request is None:
                    # A TLS handshake: what servers without TLS say to it.
                    await stream.send_all(b"HTTP/1.0 400 Bad Request\r\n\r\n")
                    return
                self.requests.append(request)
                if request.target == "/v2/":  # asked to find out about TLS
                    await stream.send_all(reply("200 OK"))
                    return
                await self.handler(request, stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass


async def _receive(stream: trio.abc.Stream) -> Request | None:
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = await stream.receive_some()
        if not chunk:
            raise trio.BrokenResourceError
        data += chunk
        if data[0] == 0x16:
            return None
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    method, target, _ = first.split()
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    while len(body) < int(headers.get("content-length", "0")):
        body += await stream.receive_some()
    return Request(method, target, headers, body, trio.current_time())


def reply(status: str, headers: dict[str, str] | None = None, body: bytes = b"") -> bytes:
    """A whole answer, after which the connection ends; ``headers`` replace the usual ones."""
    merged = {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in merged.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def always(answer: bytes) -> Handler:
    """A handler that gives one answer to everything."""

    async def handle(request: Request, stream: trio.abc.Stream) -> None:
        await stream.send_all(answer)

    return handle


@asynccontextmanager
async def hostile_server(
    handler: Handler, tls: ssl.SSLContext | None = None
) -> AsyncIterator[HostileServer]:
    """Serve until the block ends."""
    server = HostileServer("", handler)
    async with trio.open_nursery() as nursery:
        serve: Callable[..., Awaitable[object]]
        if tls is None:
            serve = partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1")
        else:
            serve = partial(
                trio.serve_ssl_over_tcp,
                server.serve,
                0,
                tls,
                host="127.0.0.1",
                https_compatible=True,
            )
        listeners = await nursery.start(serve)
        listener = listeners[0] if tls is None else listeners[0].transport_listener
        server.host = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        yield server
        nursery.cancel_scope.cancel()
