"""When to ask a registry."""

from __future__ import annotations

from enum import Enum

from .._public import public


@public
class PullPolicy(Enum):
    """When to ask a registry what a name stands for, with Docker's meanings.

    Local sources are always read as they are, and a digest that is here is never asked for.

    ``ALWAYS`` asks each time, and downloads only what is not here. ``MISSING`` asks when the
    image is not here for the platform. ``NEVER`` uses no network, and raises
    :exc:`ImageNotFound` instead.
    """

    ALWAYS = "always"
    MISSING = "missing"
    NEVER = "never"
