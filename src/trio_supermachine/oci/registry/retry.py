"""Retries: the decision, without I/O, whether and when to try again."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable

import attrs

from ...errors import SupermachineError
from .settings import RegistrySettings


class Transient(Exception):
    """A failure that may pass.

    :ivar error: the error to raise if it does not.
    :ivar retry_after: the pause in seconds that the server asked for.
    :ivar unreachable: of a server that no connection can be made to, what to say behind its name.
    """

    def __init__(
        self,
        error: SupermachineError,
        retry_after: float | None = None,
        *,
        unreachable: str | None = None,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after
        self.unreachable = unreachable


@attrs.define
class Retry:
    """A count of failed attempts, of which :attr:`limit` are enough."""

    settings: RegistrySettings
    limit: int
    _chance: Callable[[], float] = random.random
    _failed: int = 0

    def advanced(self) -> None:
        """Begin to count anew, since something was achieved."""
        self._failed = 0

    def after(self, failure: Transient) -> float:
        """Count a failure, and give the seconds to wait before the next attempt.

        :raises SupermachineError: there were enough attempts; it is the failure's own error.
        """
        self._failed += 1
        if self._failed >= self.limit:
            raise failure.error
        longest = self.settings.longest_wait
        # A bound on the exponent keeps the power a proper number.
        pause = min(self.settings.backoff * 2.0 ** min(self._failed - 1, 30), longest)
        pause *= (1 + self._chance()) / 2
        return max(pause, min(failure.retry_after or 0.0, longest))


def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """Give the seconds that ``Retry-After`` asks for (RFC 9110, section 10.2.3).

    :param now: the time of day in seconds since 1970; ``None`` is the host's.
    :returns: ``None`` if the header is missing or malformed.
    """
    if value is None or len(value) > 64:
        return None
    value = value.strip()
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        return None
    return max(0.0, then - (time.time() if now is None else now))
