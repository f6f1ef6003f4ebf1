"""The ``config`` object of an image configuration: how the image is run."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping

import attrs

from .._public import public
from . import MalformedError

_MAX_ITEMS = 4096
_MAX_STRING = 128 * 1024  # bytes; Linux's own limit on one argument
_PORT = re.compile(r"([0-9]{1,5})(?:/(tcp|udp|sctp))?")
_MAX_SIGNAL = 64


@public
@attrs.frozen(kw_only=True)
class ImageConfig:
    """Settings with which an image is to be run, from its configuration."""

    #: The environment variables, as ``NAME=value``.
    env: tuple[str, ...] = ()
    #: The program to run, with arguments that stay in front of the command. May be empty.
    entrypoint: tuple[str, ...] = ()
    #: The command, which ``with_cmd`` and the command line replace.
    cmd: tuple[str, ...] = ()
    #: The directory in which programs start, an absolute path in the guest.
    workdir: str = "/"
    #: The user of programs, ``name|uid[:group|gid]``; empty for root.
    user: str = ""
    #: The signal that asks the workload to end, by its number on Linux.
    stop_signal: int = 15
    #: The ports that the workload serves, such as ``"80/tcp"``.
    exposed_ports: tuple[str, ...] = ()
    #: Notes of the image's maker.
    labels: Mapping[str, str] = attrs.field(factory=dict, hash=False)

    @property
    def argv(self) -> tuple[str, ...]:
        """The workload's argument vector: :attr:`entrypoint` and :attr:`cmd`. May be empty."""
        return self.entrypoint + self.cmd

    @classmethod
    def from_json(cls, document: object) -> ImageConfig:
        """Parse the ``config`` object of an image configuration, which is not trusted.

        :raises MalformedError: a value has the wrong type, or is out of bounds.
        """
        if document is None:
            document = {}
        if not isinstance(document, dict):
            raise MalformedError("the image's config is not an object")
        env = _strings(document, "Env")
        if any(entry.startswith("=") or "=" not in entry for entry in env):
            raise MalformedError("the image's Env has an entry that is not NAME=value")
        if not isinstance(document.get("Volumes"), dict | None):
            raise MalformedError("the image's Volumes is not an object")
        workdir = _string(document, "WorkingDir")
        return cls(
            env=env,
            entrypoint=_strings(document, "Entrypoint"),
            cmd=_strings(document, "Cmd"),
            workdir=workdir if workdir.startswith("/") else "/" + workdir,
            user=_string(document, "User"),
            stop_signal=parse_signal(_string(document, "StopSignal")),
            exposed_ports=_ports(document.get("ExposedPorts")),
            labels=_labels(document.get("Labels")),
        )

    def to_json(self) -> dict[str, object]:
        """Make the ``config`` object that :meth:`from_json` parses."""
        return {
            "Env": list(self.env),
            "Entrypoint": list(self.entrypoint),
            "Cmd": list(self.cmd),
            "WorkingDir": self.workdir,
            "User": self.user,
            "StopSignal": str(self.stop_signal),
            "ExposedPorts": {port: {} for port in self.exposed_ports},
            "Labels": dict(self.labels),
        }


def parse_signal(text: str) -> int:
    """Give a signal's Linux number from ``"SIGQUIT"``, ``"QUIT"`` or ``"3"``; 15 if empty.

    :raises MalformedError: there is no such signal.
    """
    if not text:
        return 15
    name = text.upper().removeprefix("SIG")
    number = 0
    if name.isascii() and name.isdecimal():
        number = int(name) if len(name) < 4 else 0
    elif match := re.fullmatch(r"RTMIN(?:\+([0-9]{1,2}))?|RTMAX(?:-([0-9]{1,2}))?", name):
        up, down = match.groups()
        number = 34 + int(up or 0) if name.startswith("RTMIN") else _MAX_SIGNAL - int(down or 0)
        number = number if number >= 34 else 0
    elif found := signal.Signals.__members__.get("SIG" + name):
        number = int(found)
    if not 1 <= number <= _MAX_SIGNAL:
        raise MalformedError(f"the image's StopSignal {text[:40]!r} is not a signal")
    return number


def _string(document: Mapping[str, object], key: str) -> str:
    value = document.get(key)
    return "" if value is None else _checked(value, key)


def _strings(document: Mapping[str, object], key: str) -> tuple[str, ...]:
    value = document.get(key)
    if value is None:
        return ()
    if isinstance(value, str):  # Docker takes a lone string for a list of one
        value = [value]
    if not isinstance(value, list) or len(value) > _MAX_ITEMS:
        raise MalformedError(f"the image's {key} is not a list, or too long")
    return tuple(_checked(item, key) for item in value)


def _checked(value: object, key: str) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) >= _MAX_STRING:
        raise MalformedError(f"the image's {key} has a value that is not a proper string")
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        raise MalformedError(f"the image's {key} is not proper Unicode") from None
    if len(encoded) >= _MAX_STRING:
        raise MalformedError(f"the image's {key} has too long a value")
    return value


def _ports(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > 65536:
        raise MalformedError("the image's ExposedPorts is not an object")
    ports = []
    for key in value:
        match = _PORT.fullmatch(key)
        if match is None or not 0 < int(match[1]) < 65536:
            raise MalformedError(f"the image exposes {key[:40]!r}, which is not a port")
        ports.append((int(match[1]), match[2] or "tcp"))
    return tuple(f"{port}/{protocol}" for port, protocol in sorted(set(ports)))


def _labels(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MAX_ITEMS:
        raise MalformedError("the image's Labels is not an object, or too large")
    return {_checked(key, "Labels"): _checked(item, "Labels") for key, item in value.items()}
