"""Policies of pulls: when to ask a registry."""

from __future__ import annotations

from enum import Enum

from .._public import public


@public
class PullPolicy(Enum):
    """A rule when to ask a registry for the image that a name stands for; as in Docker.

    References to local sources are read each time, whatever the policy. An image that is named by
    its digest and is in the data directory is never asked for.
    """

    #: Ask each time. Download only what is not in the data directory.
    ALWAYS = "always"
    #: Ask when the data directory does not have the image for the platform.
    MISSING = "missing"
    #: Use no network. An image that is not in the data directory raises :exc:`ImageNotFound`.
    NEVER = "never"
