"""Limits on the size of layers and images."""

from __future__ import annotations

import os
from typing import Final

from ..errors import ConfigError

#: The environment variable that sets the limit of a layer.
VARIABLE: Final = "TRIO_SUPERMACHINE_MAX_LAYER"

_MAX_LAYER: Final = 64 << 30
_LAYERS: Final = 4  # layers of the full size that an image may have together


def max_layer() -> int:
    """Give the most bytes of one layer, stored or unpacked: 64 GiB, or the environment's value.

    :raises ConfigError: that value is no number of bytes.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return _MAX_LAYER
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text)):
        raise ConfigError(f"{VARIABLE} is a number of bytes, such as {_MAX_LAYER}, not {text!r}")
    return int(text)


def max_image() -> int:
    """Give the most bytes of all layers of an image together, as they are stored."""
    return _LAYERS * max_layer()
