"""A proxy between a client and a plain registry that does what networks and servers do.

It passes bytes on. A plan says which requests meet with which fault: each request whose first
line has a fault's ``on`` in it takes the first such fault out of the plan. Requests must have no
body, as those of a pull, and are not pipelined. TLS is passed on as it is, without faults.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial

import attrs
import trio

_PIECE = 16384


@attrs.frozen(kw_only=True)
class Fault:
    """What happens to the answer of a request whose first line contains ``on``.

    After ``after`` bytes of the answer, its head included, comes what subclasses do.
    """

    on: str = ""
    after: int = 0


@attrs.frozen(kw_only=True)
class Drop(Fault):
    """The connection is closed."""


@attrs.frozen(kw_only=True)
class Stall(Fault):
    """Nothing more comes."""


@attrs.frozen(kw_only=True)
class Flip(Fault):
    """The next byte is another one."""


@attrs.frozen(kw_only=True)
class Trickle(Fault):
    """The rest comes in pieces of ``piece`` bytes, every ``pause`` seconds."""

    piece: int = 1
    pause: float = 0.001


@attrs.frozen(kw_only=True)
class Answer(Fault):
    """The registry is not asked: this is the answer, and the connection is closed."""

    status: str = "503 Service Unavailable"
    headers: tuple[str, ...] = ()
    body: bytes = b""

    def encode(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status}", *self.headers, "Connection: close"]
        lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode() + self.body


class FaultProxy:
    """A running proxy; :attr:`requests` are the first lines that came, in order."""

    def __init__(self, target: tuple[str, int], plan: Iterable[Fault]) -> None:
        self.plan = list(plan)
        self.requests: list[str] = []
        self.host = ""
        self._target = target

    def count(self, text: str) -> int:
        """How many requests had ``text`` in their first line."""
        return sum(text in line for line in self.requests)

    def _fault(self, line: str) -> Fault | None:
        for fault in self.plan:
            if fault.on in line:
                self.plan.remove(fault)
                return fault
        return None

    async def _serve(self, client: trio.SocketStream) -> None:
        async with client:
            try:
                async with await trio.open_tcp_stream(*self._target) as server:
                    await _Connection(self, client, server).run()
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                pass


class _Connection:
    def __init__(
        self, proxy: FaultProxy, client: trio.SocketStream, server: trio.SocketStream
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._fault: Fault | None = None
        self._room = math.inf  # bytes until the fault

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answers, nursery.cancel_scope)
                await self._requests()
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def _requests(self) -> None:
        data = b""
        while chunk := await self._client.receive_some(_PIECE):
            data += chunk
            if data[0] == 0x16:  # a TLS handshake
                await self._server.send_all(data)
                data = b""
                continue
            while b"\r\n\r\n" in data:
                head, _, data = data.partition(b"\r\n\r\n")
                line = head.split(b"\r\n")[0].decode()
                self._proxy.requests.append(line)
                self._fault = self._proxy._fault(line)
                if isinstance(self._fault, Answer):
                    await self._client.send_all(self._fault.encode())
                    return
                self._room = math.inf if self._fault is None else self._fault.after
                await self._server.send_all(head + b"\r\n\r\n")

    async def _answers(self, scope: trio.CancelScope) -> None:
        while data := await self._server.receive_some(_PIECE):
            before = data[: int(min(self._room, len(data)))]
            if before:
                await self._client.send_all(before)
            self._room -= len(before)
            if rest := data[len(before) :]:
                await self._fail(rest)
        scope.cancel()

    async def _fail(self, rest: bytes) -> None:
        match self._fault:
            case Flip():
                self._room = math.inf
                await self._client.send_all(bytes([rest[0] ^ 1]) + rest[1:])
            case Trickle(piece=piece, pause=pause):
                for start in range(0, len(rest), piece):
                    await self._client.send_all(rest[start : start + piece])
                    await trio.sleep(pause)
            case Stall():
                await trio.sleep_forever()
            case _:
                await self._client.aclose()
                raise trio.ClosedResourceError


def through(proxy: FaultProxy, reference: str) -> str:
    """The same image, asked for by way of a proxy."""
    return f"docker://{proxy.host}/" + reference.removeprefix("docker://").partition("/")[2]


@asynccontextmanager
async def fault_proxy(
    target: tuple[str, int], plan: Iterable[Fault] = ()
) -> AsyncIterator[FaultProxy]:
    """Serve as a proxy of ``target`` on loopback until the block ends."""
    proxy = FaultProxy(target, plan)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), proxy._serve, 0)
        port = listeners[0].socket.getsockname()[1]
        proxy.host = f"127.0.0.1:{port}"
        yield proxy
        nursery.cancel_scope.cancel()
