"""JSON files with credentials: Docker's ``config.json`` and containers-auth.json(5)."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from ...errors import ConfigError
from ...host.files import new_file
from .registries_conf import config_home

_MAX_FILE = 4 << 20
_HUB_HOSTS = ("docker.io", "index.docker.io", "registry-1.docker.io")
#: The key under which ``docker login`` keeps credentials for Docker Hub.
HUB_KEY = "https://index.docker.io/v1/"


def auth_files() -> list[Path]:
    """List the files that may have credentials, in the order of search."""
    if explicit := os.environ.get("REGISTRY_AUTH_FILE"):
        return [Path(explicit)]
    docker = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    found = [Path(docker) / "config.json"]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(runtime) / "containers/auth.json")
    return [*found, config_home() / "containers/auth.json"]


def normalise_key(key: str) -> str:
    """Give a file's key as ``HOST[:PORT][/PATH]``. Docker sometimes writes a whole address."""
    bare = key.removeprefix("https://").removeprefix("http://")
    host, _, path = bare.partition("/")
    if host in _HUB_HOSTS:
        host = "docker.io"
    if bare != key or path.rstrip("/") in ("v1", "v2"):
        path = ""
    return f"{host}/{path}".rstrip("/")


def file_key(registry: str) -> str:
    """Give the key under which a registry's credentials are kept."""
    return HUB_KEY if registry == "docker.io" else registry


@attrs.frozen
class Entry:
    """The credentials that a file has under one key.

    :ivar token: an identity token, instead of a password.
    """

    username: str
    password: str = attrs.field(repr=False)
    token: str | None = attrs.field(repr=False)


class AuthFile:
    """A file of credentials, which need not exist. Its other content is kept."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self._path = path
        self._document = document

    @classmethod
    def read(cls, path: Path) -> AuthFile:
        """Read a file.

        :raises ConfigError: it cannot be read, or is malformed.
        """
        try:
            with path.open("rb") as stream:
                data = stream.read(_MAX_FILE + 1)
        except (FileNotFoundError, NotADirectoryError):
            return cls(path, {})
        except OSError as exc:
            raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
        try:
            document = json.loads(data) if len(data) <= _MAX_FILE else None
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise ConfigError(f"{path} is not a JSON object; correct or remove it")
        return cls(path, document)

    def helper(self, keys: list[str], *, to_store: bool = False) -> tuple[str, str] | None:
        """Find the helper program for the first of ``keys`` that has one, and the key to ask for.

        A helper for all registries (``credsStore``) is asked if the file itself has no entry. New
        credentials always go to it.
        """
        named = {normalise_key(k): v for k, v in self._object("credHelpers").items()}
        for key in keys:
            if isinstance(program := named.get(key), str) and program:
                return program, file_key(key)
        program = self._document.get("credsStore")
        if isinstance(program, str) and program and (to_store or self.entry(keys) is None):
            return program, file_key(keys[-1])
        return None

    def entry(self, keys: list[str]) -> Entry | None:
        """Find what the file itself has for the first of ``keys`` that it knows.

        :raises ConfigError: the entry is malformed.
        """
        auths: dict[str, object] = {}
        for name, value in self._object("auths").items():
            # A registry may be there in two spellings. The one that is not empty counts.
            if value:
                auths.setdefault(normalise_key(name), value)
        for key in keys:
            if (value := auths.get(key)) is not None and (entry := self._entry(value)):
                return entry
        return None

    def set(self, registry: str, username: str, password: str, token: str | None) -> None:
        """Put credentials into the file; :meth:`write` writes them."""
        self.remove(registry)
        text = base64.b64encode(f"{username}:{password}".encode()).decode()
        value = {"auth": text} if token is None else {"auth": text, "identitytoken": token}
        self._document["auths"] = {**self._object("auths"), file_key(registry): value}

    def remove(self, registry: str) -> bool:
        """Take credentials out of the file. Give whether there were any."""
        auths = self._object("auths")
        kept = {name: value for name, value in auths.items() if normalise_key(name) != registry}
        if len(kept) == len(auths):
            return False
        self._document["auths"] = kept
        return True

    def write(self) -> None:
        """Replace the file by one that its owner alone can read.

        :raises ConfigError: it cannot be written.
        """
        try:
            # A symbolic link stays one.
            with new_file(Path(os.path.realpath(self._path))) as temporary:
                temporary.write_text(json.dumps(self._document, indent="\t") + "\n")
        except OSError as exc:
            raise ConfigError(f"{self._path} cannot be written: {exc.strerror}") from exc

    def _object(self, key: str) -> Mapping[str, Any]:
        value = self._document.get(key) or {}
        if not isinstance(value, dict):
            raise ConfigError(f"{self._path}: {key} is not an object")
        return value

    def _entry(self, value: object) -> Entry | None:
        fields = value if isinstance(value, dict) else {}
        text, token = fields.get("auth") or "", fields.get("identitytoken") or None
        name, password = fields.get("username") or "", fields.get("password") or ""
        try:
            if text:
                name, _, password = base64.b64decode(text, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, TypeError, ValueError):
            raise ConfigError(f"{self._path}: an auth is not base64 of USER:PASSWORD") from None
        if not (isinstance(name, str) and isinstance(password, str)) or not isinstance(
            token, str | None
        ):
            raise ConfigError(f"{self._path}: an entry of auths has a value that is no string")
        # Docker pads the password with NULs.
        password = password.rstrip("\0")
        return Entry(name, password, token) if token or name else None
