"""``registries.conf``: mirrors, blocks and trust, in version 2 of containers-registries.conf(5).

If ``$CONTAINERS_REGISTRIES_CONF`` is set, that file alone is read. Otherwise the user's file is
read, or without one the system's; and then the files in ``registries.conf.d`` of the system and of
the user. A table replaces an earlier one of the same prefix.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from ...errors import ConfigError

_SYSTEM: Final = Path("/etc/containers")
_MAX_FILE = 1 << 20
_MAX_TABLES = 1000
_PULLS = ("all", "digest-only", "tag-only")


@attrs.frozen(kw_only=True)
class Location:
    """A place that serves images: a host, perhaps with the beginning of a repository's name.

    :ivar pull: the references that it is asked for: ``"all"``, ``"digest-only"`` or
        ``"tag-only"``.
    """

    location: str
    insecure: bool = False
    pull: str = "all"


@attrs.frozen(kw_only=True)
class RegistryTable:
    """A table ``[[registry]]``: settings for names that begin with :attr:`prefix`."""

    prefix: str
    location: str
    insecure: bool = False
    blocked: bool = False
    mirrors: tuple[Location, ...] = ()
    file: Path = attrs.field(default=Path(), eq=False)

    def match(self, name: str) -> int | None:
        """Give the length of ``name`` that the prefix covers; ``None`` if it covers nothing.

        :param name: ``HOST[:PORT]/PATH[:TAG][@DIGEST]``.
        """
        if self.prefix.startswith("*."):
            host = name.partition("/")[0]
            return len(host) if host.partition(":")[0].endswith(self.prefix[1:]) else None
        if not name.startswith(self.prefix):
            return None
        after = name[len(self.prefix) : len(self.prefix) + 1]
        # A colon behind a host begins a port: that is another registry.
        ends = after in ("", "/", "@") or (after == ":" and "/" in self.prefix)
        return len(self.prefix) if ends else None

    def sources(self, name: str, *, by_digest: bool) -> list[Location]:
        """List the locations to ask for ``name``, in order, each with the rest of the name."""
        covered = self.match(name)
        assert covered is not None
        rest = name[covered:]
        found = []
        for mirror in self.mirrors:
            if mirror.pull == "all" or mirror.pull == ("digest-only" if by_digest else "tag-only"):
                found.append(attrs.evolve(mirror, location=mirror.location + rest))
        own = name if not self.location else self.location + rest
        return [*found, Location(location=own, insecure=self.insecure)]


def sources_of(
    name: str, tables: Iterable[RegistryTable], *, by_digest: bool
) -> tuple[list[Location], RegistryTable | None]:
    """List the locations to ask for ``name``, in order, and give the table that says so.

    The table with the longest prefix counts. ``name`` is as for :meth:`RegistryTable.match`.
    """
    chosen = max(
        (table for table in tables if table.match(name) is not None),
        key=lambda table: len(table.prefix),
        default=None,
    )
    if chosen is None:
        return [Location(location=name)], None
    return chosen.sources(name, by_digest=by_digest), chosen


def read_tables() -> list[RegistryTable]:
    """Read the tables of all files of this host.

    :raises ConfigError: a file cannot be read, or is malformed.
    """
    tables: dict[str, RegistryTable] = {}
    for file in _files():
        for table in parse_tables(_read(file), file):
            tables[table.prefix] = table
    return list(tables.values())


def parse_tables(text: str, file: Path) -> list[RegistryTable]:
    """Parse the tables of one file.

    :raises ConfigError: it is malformed.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{file} is not TOML: {exc}") from None
    if "registries" in document:
        raise ConfigError(f"{file} has the format of version 1; write [[registry]] tables")
    return [_table(each, file) for each in _tables(document, "registry", file)]


def _files() -> list[Path]:
    if explicit := os.environ.get("CONTAINERS_REGISTRIES_CONF"):
        return [Path(explicit)]
    user = config_home() / "containers"
    main = user / "registries.conf"
    if not main.exists():
        main = _SYSTEM / "registries.conf"
    found = [main] if main.exists() else []
    for directory in (_SYSTEM, user):
        found += sorted((directory / "registries.conf.d").glob("*.conf"))
    return found


def config_home() -> Path:
    """Give XDG's directory for configuration."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise ConfigError(f"{file} has more than {_MAX_FILE} bytes")
        return data.decode()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{file} cannot be read: {exc}") from exc


def _table(table: Mapping[str, Any], file: Path) -> RegistryTable:
    location = _location(_text(table, "location", file), file)
    prefix = _location(_text(table, "prefix", file), file, wildcard=True) or location
    if not prefix or (not location and not prefix.startswith("*.")):
        raise ConfigError(f"{file}: a [[registry]] has no location")
    by_digest = _flag(table, "mirror-by-digest-only", file)
    mirrors = tuple(
        _mirror(mirror, file, by_digest=by_digest) for mirror in _tables(table, "mirror", file)
    )
    return RegistryTable(
        prefix=prefix,
        location=location,
        insecure=_flag(table, "insecure", file),
        blocked=_flag(table, "blocked", file),
        mirrors=mirrors,
        file=file,
    )


def _mirror(table: Mapping[str, Any], file: Path, *, by_digest: bool) -> Location:
    location = _location(_text(table, "location", file), file)
    if not location:
        raise ConfigError(f"{file}: a mirror has no location")
    pull = _text(table, "pull-from-mirror", file) or ("digest-only" if by_digest else "all")
    if pull not in _PULLS:
        raise ConfigError(f"{file}: pull-from-mirror is {pull!r}, not one of {', '.join(_PULLS)}")
    return Location(location=location, insecure=_flag(table, "insecure", file), pull=pull)


def _location(text: str, file: Path, *, wildcard: bool = False) -> str:
    bare = text.removeprefix("*.") if wildcard else text
    if text and not re.fullmatch(r"[A-Za-z0-9.\-_:/@\[\]]{1,512}", bare):
        raise ConfigError(f"{file}: {text[:256]!r} is not HOST[:PORT][/NAME]")
    if "://" in text:
        raise ConfigError(f"{file}: leave out the scheme of {text[:256]!r}")
    return text.rstrip("/")


def _tables(document: Mapping[str, Any], key: str, file: Path) -> list[Mapping[str, Any]]:
    found = document.get(key, [])
    if (
        not isinstance(found, list)
        or len(found) > _MAX_TABLES
        or not all(isinstance(item, dict) for item in found)
    ):
        raise ConfigError(f"{file}: {key} is not a list of [[tables]]")
    return found


def _text(table: Mapping[str, Any], key: str, file: Path) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f"{file}: {key} is not a string")
    return value


def _flag(table: Mapping[str, Any], key: str, file: Path) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{file}: {key} is not true or false")
    return value
