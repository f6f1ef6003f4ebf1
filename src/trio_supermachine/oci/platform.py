"""Which of an image's variants to take."""

from __future__ import annotations

import platform as host
import re
from collections.abc import Mapping

import attrs

from ..errors import ConfigError

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_PLATFORM = re.compile(r"([a-z0-9_]+)/([a-z0-9_]+)(?:/([a-z0-9_.]+))?", re.ASCII)


@attrs.frozen
class Platform:
    """An operating system, an architecture in Go's words and its variant, if that matters."""

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
            machine = host.machine().lower()
            return Platform("linux", _ARCHITECTURES.get(machine, machine))
        match = _PLATFORM.fullmatch(text)
        if match is None:
            raise ConfigError(f"platform {text!r} is not like 'linux/amd64' or 'linux/arm64/v8'")
        return Platform(match[1], match[2], match[3])

    @staticmethod
    def of(document: object) -> Platform | None:
        """The platform that a descriptor or configuration states, if it does."""
        if not isinstance(document, Mapping):
            return None
        os, architecture, variant = map(document.get, ("os", "architecture", "variant"))
        if not (isinstance(os, str) and os and isinstance(architecture, str) and architecture):
            return None
        return Platform(os, architecture, variant if isinstance(variant, str) and variant else None)

    def accepts(self, other: Platform | None) -> bool:
        """Whether an image for ``other`` will do; one that says nothing will."""
        if other is None:
            return True
        return (self.os, self.architecture) == (other.os, other.architecture) and (
            self.variant is None or other.variant is None or self.variant == other.variant
        )
