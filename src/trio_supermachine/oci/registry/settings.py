"""Settings of the registry client: its patience, and its trust."""

from __future__ import annotations

import math
from typing import Any

import attrs

from ...errors import ConfigError


def _positive(_: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{attribute.name} is {value!r}; give a number above 0")


@attrs.frozen(kw_only=True)
class RegistrySettings:
    """Patience and trust of a registry client.

    :ivar attempts: the number of times that a request is tried. A blob is tried so many times
        again after each time that it advanced.
    :ivar backoff: the first pause between attempts, in seconds. Each further one is twice as long;
        half of each is chance.
    :ivar longest_wait: the longest pause, in seconds, also of those that a registry asks for by
        ``Retry-After``.
    :ivar stall_timeout: seconds in which a connection has to bring a kilobyte, else it is given up.
    :ivar insecure: for all registries, what ``insecure = true`` in registries.conf is for one:
        HTTPS without checks, and plain HTTP if the registry does not speak HTTPS.
    :raises ConfigError: a number is out of range.
    """

    attempts: int = attrs.field(default=5, validator=_positive)
    backoff: float = attrs.field(default=0.5, validator=_positive)
    longest_wait: float = attrs.field(default=60.0, validator=_positive)
    stall_timeout: float = attrs.field(default=30.0, validator=_positive)
    insecure: bool = False
