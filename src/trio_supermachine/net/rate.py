"""A limit on bytes per second, and streams that keep to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

import attrs
import trio

from ..vsock.stream import VsockStream

_MAX_CHUNK: Final = 65536
_MIN_BURST: Final = 2048


@final
@attrs.define
class TokenBucket:
    """A token bucket without I/O. More may be taken than there is, which leaves a debt.

    :ivar rate: tokens per second.
    :ivar burst: the most tokens that gather: an eighth of a second's, at least 2048.
    """

    rate: int
    burst: int = attrs.field(init=False)
    _level: float = attrs.field(init=False)
    _updated: float | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.burst = max(_MIN_BURST, self.rate // 8)
        self._level = self.burst

    def take(self, amount: int, now: float) -> float:
        """Take ``amount``, and return the seconds to wait until the debt is paid."""
        self._fill(now)
        self._level -= amount
        return max(0.0, -self._level / self.rate)

    def try_take(self, amount: int, now: float) -> bool:
        """Take ``amount`` unless there is a debt. Return whether it was taken."""
        self._fill(now)
        if self._level <= 0:
            return False
        self._level -= amount
        return True

    def _fill(self, now: float) -> None:
        if self._updated is not None:
            self._level = min(self.burst, self._level + (now - self._updated) * self.rate)
        self._updated = now


@final
class PacedStream(trio.abc.HalfCloseableStream):
    """A stream that takes a token out of a bucket for each byte, in both directions.

    A cancelled :meth:`receive_some` loses bytes: cancel only to give the stream up.
    """

    def __init__(self, stream: VsockStream, bucket: TokenBucket) -> None:
        self._stream = stream
        self._bucket = bucket
        self._chunk = min(_MAX_CHUNK, bucket.burst)

    async def _pay(self, amount: int) -> None:
        delay = self._bucket.take(amount, trio.current_time())
        if delay:
            await trio.sleep(delay)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), self._chunk):
            part = view[start : start + self._chunk]
            await self._pay(len(part))
            await self._stream.send_all(part)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        wanted = self._chunk if max_bytes is None else min(max_bytes, self._chunk)
        data = await self._stream.receive_some(wanted)
        await self._pay(len(data))
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()

    def when_gone(self, call: Callable[[], None]) -> None:
        """Register a call as :meth:`.VsockStream.when_gone` does."""
        self._stream.when_gone(call)

    def abort(self) -> None:
        """Leave by resetting the connection. Plain."""
        self._stream.abort()
