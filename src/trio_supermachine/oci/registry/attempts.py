"""Trying again, and elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import trio

from ..._util.trace import trace
from ...errors import ImageCorrupt, ImageNotFound, RegistryError
from .host import Host
from .retry import Retry, Transient
from .settings import RegistrySettings

T = TypeVar("T")

#: What a mirror's failure may be, for which the next one is asked.
Failed = (Transient, RegistryError, ImageNotFound, ImageCorrupt)
_ATTEMPTS_AT_MIRROR: Final = 2


class Attempts:
    """Which :attr:`host` is asked next, and when; the last one's failures are the caller's."""

    def __init__(self, hosts: Sequence[Host], settings: RegistrySettings) -> None:
        self._hosts = hosts
        self._settings = settings
        self._number = 0
        self._retry = self._fresh()

    @property
    def host(self) -> Host:
        """The host to ask now."""
        return self._hosts[self._number]

    def advanced(self) -> None:
        """Something has been achieved: begin to count anew."""
        self._retry.advanced()

    async def failed(
        self, failure: Transient | RegistryError | ImageNotFound | ImageCorrupt
    ) -> None:
        """Wait until the next attempt is due.

        :raises SupermachineError: there is none.
        """
        trace("oci", "registry %s: %s", self.host.endpoint.name, failure)
        try:
            if not isinstance(failure, Transient):
                raise failure
            pause = self._retry.after(failure)
        except (RegistryError, ImageNotFound, ImageCorrupt):
            if self._number + 1 == len(self._hosts):
                raise
            self._number += 1
            self._retry = self._fresh()
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(pause)

    async def run(self, operation: Callable[[Host], Awaitable[T]]) -> T:
        """The result of an operation that may have to be tried again."""
        while True:
            try:
                return await operation(self.host)
            except Failed as failure:
                await self.failed(failure)

    def _fresh(self) -> Retry:
        limit = self._settings.attempts
        if self._number + 1 < len(self._hosts):
            limit = min(limit, _ATTEMPTS_AT_MIRROR)
        return Retry(self._settings, limit)
