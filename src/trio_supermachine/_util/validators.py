"""Checks of configuration values, shared by the classes that hold them.

Each check raises :exc:`ConfigError`, so that a wrong value is reported where it is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ..errors import ConfigError

StrPath = str | os.PathLike[str]

MAX_PORT: Final = 65535

_MAX_SOCKET_PATH: Final = 107  # bytes in a sockaddr_un, without the NUL at their end
_SOCKET_NAME_BYTES: Final = len("vm-0123456789abcdef-vsock.sock")


def integer(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """Check that ``value`` is an integer (no ``bool``) within the bounds, and return it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, not {value!r}")
    if value < minimum:
        raise ConfigError(f"{name} must be at least {minimum}, not {value}")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name} must be at most {maximum}, not {value}")
    return value


def boolean(name: str, value: object) -> bool:
    """Check that ``value`` is ``True`` or ``False``, and return it."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {value!r}")
    return value


def seconds(name: str, value: object) -> float:
    """Check that ``value`` is a number of seconds above 0, perhaps infinite, and return it."""
    # "not >" refuses NaN, too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{name} must be a number of seconds above 0, not {value!r}")
    return value


def host_path(value: StrPath) -> Path:
    """Check that ``value`` names a host file, and return it as a :class:`~pathlib.Path`."""
    path: object = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path or "\0" in path:
        raise ConfigError(f"a host path must be text without NUL, not {value!r}")
    return Path(path)


def host_paths(values: Iterable[StrPath]) -> tuple[Path, ...]:
    """Check that ``values`` name host files, and return them as a tuple of paths."""
    if isinstance(values, str):
        raise ConfigError(f"give a sequence of paths, not one: {values!r}")
    return tuple(host_path(value) for value in values)


def guest_path(value: StrPath) -> str:
    """Check that ``value`` is an absolute path in the guest, and return it as a string."""
    path: object = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise ConfigError(f"a guest path must be absolute and without NUL, not {value!r}")
    return path


def port(name: str, value: object, minimum: int = 0) -> int:
    """Check that ``value`` is a port number, and return it."""
    return integer(name, value, minimum, MAX_PORT)


def socket_directory(directory: Path) -> None:
    """Check that the paths of unix sockets in ``directory`` are short enough."""
    longest = len(os.fsencode(directory.absolute())) + 1 + _SOCKET_NAME_BYTES
    if longest > _MAX_SOCKET_PATH:
        raise ConfigError(
            f"the path of a unix socket in {directory} has {longest} bytes, and"
            f" {_MAX_SOCKET_PATH} are the most; take a directory with a shorter name"
        )
