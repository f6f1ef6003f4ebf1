"""Blobs: their bytes, across lost connections."""

from __future__ import annotations

from typing import final

from ...errors import ImageCorrupt, ImageNotFound
from .. import MalformedError
from .attempts import Attempts, Failed
from .failures import failure_of, said_by
from .host import Host
from .ranges import bytes_to_skip
from .retry import Transient
from .wire import ADVANCE, Answer


@final
class BlobStream:
    """An asynchronous iterator over a blob's bytes from a place on.

    After a lost connection it asks for the rest, of the same host or the next. It never gives more
    bytes than the blob's size.
    """

    def __init__(
        self, attempts: Attempts, *, reference: str, digest: str, size: int, start: int
    ) -> None:
        self._attempts = attempts
        self._reference = reference
        self._digest = digest
        self._size = size
        self._at = start
        self._mark = start  # the place of the last failure
        self._skip = 0
        self._answer: Answer | None = None

    def __aiter__(self) -> BlobStream:
        return self

    async def __anext__(self) -> bytes:
        while self._at < self._size:
            try:
                if chunk := await self._next():
                    return chunk
            except Failed as failure:
                if self._at - self._mark >= ADVANCE:
                    self._attempts.advanced()
                self._mark = self._at
                await self.aclose()
                await self._attempts.failed(failure)
        await self._check_end()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Close the connection."""
        answer, self._answer = self._answer, None
        if answer is not None:
            await answer.aclose()

    async def _next(self) -> bytes:
        if self._answer is None:
            self._answer = await self._open(self._attempts.host)
        chunk = await self._answer.receive()
        if not chunk:
            raise Transient(self._corrupt(f"its body ends after {self._at} of {self._size} bytes"))
        skipped = min(self._skip, len(chunk))
        self._skip -= skipped
        chunk = chunk[skipped:]
        if self._at + len(chunk) > self._size:
            raise self._corrupt(f"its body goes on after {self._size} bytes")
        self._at += len(chunk)
        return chunk

    async def _open(self, host: Host) -> Answer:
        headers = {}
        if self._at:
            headers["Range"] = f"bytes={self._at}-{self._size - 1}"
        path = f"{host.endpoint.path}/blobs/{self._digest}"
        answer = await host.request("GET", path, headers)
        try:
            await self._check_head(answer, host)
        except BaseException:
            await answer.aclose()
            raise
        return answer

    async def _check_head(self, answer: Answer, host: Host) -> None:
        if answer.status == 404:
            said = await said_by(answer)
            reason = f"{host.endpoint.name} does not have its blob {self._digest}"
            raise ImageNotFound(self._reference, f"{reason} ({said})" if said else reason)
        if answer.status == 416:
            raise self._corrupt(f"the registry has less than {self._size} bytes of it")
        if answer.status not in (200, 206):
            registry, known = host.endpoint.name, host.authorizer.has_credentials
            what = f"the blob {self._digest}"
            raise await failure_of(answer, what, registry=registry, known=known)
        try:
            self._skip = bytes_to_skip(
                answer.status,
                answer.header("Content-Range"),
                answer.header("Content-Length"),
                start=self._at,
                size=self._size,
            )
        except MalformedError as exc:
            raise self._corrupt(str(exc)) from None

    async def _check_end(self) -> None:
        if self._answer is None:
            return
        try:
            more = await self._answer.receive()
        except Transient:
            more = b""  # the blob is complete all the same
        await self.aclose()
        if more:
            raise self._corrupt(f"its body goes on after {self._size} bytes")

    def _corrupt(self, reason: str) -> ImageCorrupt:
        return ImageCorrupt(self._reference, f"the blob {self._digest}: {reason}")
