"""Attempts: when to ask a host again, and when to ask the next one."""

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

#: Failures of a mirror after which the next host is asked.
Failed: Final = (Transient, RegistryError, ImageNotFound, ImageCorrupt)
_ATTEMPTS_AT_MIRROR: Final = 2


class Attempts:
    """The attempts at one operation, host after host. The caller gets the last host's failure.

    :param image: the image that the operation serves, to be named where no host can be reached.
    """

    def __init__(
        self, hosts: Sequence[Host], settings: RegistrySettings, image: str | None = None
    ) -> None:
        self._hosts = hosts
        self._settings = settings
        self._image = image
        self._number = 0
        self._retry = self._fresh()

    @property
    def host(self) -> Host:
        """The host to ask now."""
        return self._hosts[self._number]

    def advanced(self) -> None:
        """Begin to count attempts anew, since something was achieved."""
        self._retry.advanced()

    async def failed(
        self, failure: Transient | RegistryError | ImageNotFound | ImageCorrupt
    ) -> None:
        """Take a failure, and wait until the next attempt is due, perhaps at the next host.

        :raises SupermachineError: there is no further attempt; it is the failure's own error.
        """
        trace("oci", "registry %s: %s", self.host.endpoint.name, failure)
        try:
            if not isinstance(failure, Transient):
                raise failure
            try:
                pause = self._retry.after(failure)
            except RegistryError as error:
                raise self._naming_the_image(failure, error) from error.__cause__
        except (RegistryError, ImageNotFound, ImageCorrupt):
            if self._number + 1 == len(self._hosts):
                raise
            self._number += 1
            self._retry = self._fresh()
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(pause)

    async def run(self, operation: Callable[[Host], Awaitable[T]]) -> T:
        """Run an operation until it succeeds, or there is no further attempt."""
        while True:
            try:
                return await operation(self.host)
            except Failed as failure:
                await self.failed(failure)

    def _naming_the_image(self, failure: Transient, error: RegistryError) -> RegistryError:
        if self._image is None or failure.unreachable is None:
            return error
        return RegistryError(
            f"{self._image} cannot be pulled: its registry ({error.registry})"
            f" {failure.unreachable}, or load it from a file: trio-supermachine load",
            registry=error.registry,
        )

    def _fresh(self) -> Retry:
        limit = self._settings.attempts
        if self._number + 1 < len(self._hosts):
            limit = min(limit, _ATTEMPTS_AT_MIRROR)
        return Retry(self._settings, limit)
