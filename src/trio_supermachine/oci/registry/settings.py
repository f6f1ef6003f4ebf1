"""How patient the registry client is."""

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

    A request is tried :attr:`attempts` times, and a blob that many times after each time it
    advanced. :attr:`backoff` seconds is the first pause between attempts, from which they double
    (half of each is chance) up to :attr:`longest_wait`, also for what a registry asks by
    ``Retry-After``. A connection that brings less than a kilobyte in :attr:`stall_timeout`
    seconds is given up. :attr:`insecure` does for all registries what ``insecure = true`` in
    registries.conf does for one: HTTPS without checks, and HTTP where there is no HTTPS.

    :raises ConfigError: a number is out of range.
    """

    attempts: int = attrs.field(default=5, validator=_positive)
    backoff: float = attrs.field(default=0.5, validator=_positive)
    longest_wait: float = attrs.field(default=60.0, validator=_positive)
    stall_timeout: float = attrs.field(default=30.0, validator=_positive)
    insecure: bool = False
