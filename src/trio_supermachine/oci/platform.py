"""Platforms: operating systems, architectures and variants, and which will do for which."""

from __future__ import annotations

import platform as host
import re
from collections.abc import Mapping

import attrs

from ..errors import ConfigError
from . import MalformedError

#: Other names of architectures, which people and tools write, with the variants that they imply.
_ALIASES = {
    "x86_64": ("amd64", None),
    "aarch64": ("arm64", None),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "i386": ("386", None),
}
_BASELINE = {"amd64": 1, "arm": 7, "arm64": 8}  # the variant that is meant where none is named
_MAX_NAME = 64
_VARIANT = re.compile(r"v?([0-9])", re.ASCII)
_PLATFORM = re.compile(r"([a-z0-9_]+)/([a-z0-9_]+)(?:/([a-z0-9_.]+))?", re.ASCII)


@attrs.frozen
class Platform:
    """An operating system and an architecture, by Go's names, and the architecture's variant."""

    os: str
    architecture: str
    variant: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    @staticmethod
    def parse(text: str | None) -> Platform:
        """Parse ``os/architecture[/variant]``; ``None`` is Linux on this machine.

        :raises ConfigError: it does not parse.
        """
        if text is None:
            return _normal("linux", host.machine().lower(), None)
        match = _PLATFORM.fullmatch(text)
        if match is None:
            raise ConfigError(f"platform {text!r} is not like 'linux/amd64' or 'linux/arm64/v8'")
        return _normal(match[1], match[2], match[3])

    @staticmethod
    def of(document: Mapping[str, object]) -> Platform | None:
        """Read the platform that a descriptor or configuration states; ``None`` if it states none.

        :raises MalformedError: a part of it is no proper text.
        """
        stated = [document.get(key) or "" for key in ("os", "architecture", "variant")]
        for value in stated:
            if not isinstance(value, str) or not value.isprintable() or len(value) > _MAX_NAME:
                raise MalformedError("an os, architecture or variant is not a proper string")
        os, architecture, variant = map(str, stated)
        return _normal(os, architecture, variant or None) if os and architecture else None

    def accepts(self, other: Platform | None) -> bool:
        """Give whether an image for ``other`` will do on this platform.

        An image that states no platform will do. So will a lower variant for a higher one: programs
        for ARMv6 run on ARMv7.
        """
        if other is None:
            return True
        if (self.os, self.architecture) != (other.os, other.architecture):
            return False
        return other.variant in (None, self.variant) or self.distance(other) >= 0

    def distance(self, other: Platform | None) -> int:
        """Give how many variants ``other`` is below this one. The nearest is the best to run.

        It is negative for a variant that is above this one, or is not known.
        """
        mine, theirs = self._level(), self._level() if other is None else other._level()
        return -1 if mine is None or theirs is None else mine - theirs

    def _level(self) -> int | None:
        if self.variant is None:
            return _BASELINE.get(self.architecture, 0)
        match = _VARIANT.fullmatch(self.variant)
        return None if match is None else int(match[1])


def _normal(os: str, architecture: str, variant: str | None) -> Platform:
    name, implied = _ALIASES.get(architecture, (architecture, None))
    return Platform(os, name, variant or implied)
