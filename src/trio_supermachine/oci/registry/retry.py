"""When to try again: a decision without I/O."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable

import attrs

from ...errors import SupermachineError
from .settings import RegistrySettings


class Transient(Exception):
    """A failure that may pass; :attr:`error` is what is raised when it does not.

    :attr:`retry_after` is the pause in seconds that the server has asked for.
    """

    def __init__(self, error: SupermachineError, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after


@attrs.define
class Retry:
    """Counts attempts in vain; :attr:`limit` of them are enough."""

    settings: RegistrySettings
    limit: int
    _chance: Callable[[], float] = random.random
    _failed: int = 0

    def advanced(self) -> None:
        """Something has been achieved: begin to count anew."""
        self._failed = 0

    def after(self, failure: Transient) -> float:
        """The seconds to wait before the next attempt.

        :raises SupermachineError: the failure's own error; there have been enough attempts.
        """
        self._failed += 1
        if self._failed >= self.limit:
            raise failure.error
        longest = self.settings.longest_wait
        # The exponent is bounded, so that the power is.
        pause = min(self.settings.backoff * 2.0 ** min(self._failed - 1, 30), longest)
        pause *= (1 + self._chance()) / 2
        return max(pause, min(failure.retry_after or 0.0, longest))


def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """The seconds of a ``Retry-After`` (RFC 9110, section 10.2.3); `None` if it makes no sense.

    ``now`` is the time of day in seconds since 1970.
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
