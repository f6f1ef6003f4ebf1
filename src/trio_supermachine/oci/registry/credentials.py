"""Credentials for registries, in the files and helper programs of Docker and Podman."""

from __future__ import annotations

from pathlib import Path

import attrs
import trio

from ...errors import ConfigError
from ...host.files import home
from ...host.locks import locked
from .auth_files import AuthFile, auth_files, normalise_key
from .helpers import ask_helper, forget_in_helper, tell_helper


@attrs.frozen(kw_only=True)
class Credentials:
    """A name with a password; or instead an identity token, for a token server."""

    username: str = ""
    password: str = attrs.field(default="", repr=False)
    identity_token: str | None = attrs.field(default=None, repr=False)


#: The name by which helpers say that the secret is an identity token.
_TOKEN_NAME = "<token>"


def keys_of(registry: str) -> list[str]:
    """List the keys under which credentials of ``HOST[:PORT][/PATH]`` may be, the best first."""
    host, _, path = normalise_key(registry).partition("/")
    parts = path.split("/") if path else []
    return ["/".join([host, *parts[:count]]) for count in range(len(parts), -1, -1)]


async def find_credentials(registry: str) -> Credentials | None:
    """Find this host's credentials for ``HOST[:PORT][/REPOSITORY]``.

    If ``$REGISTRY_AUTH_FILE`` is set, that file alone is looked through; otherwise Docker's
    ``config.json`` (in ``$DOCKER_CONFIG`` or ``~/.docker``), and then Podman's ``auth.json``. In
    each the longest match counts. Helper programs that the files name are asked, too. Cancellation
    ends a helper program.

    :raises ConfigError: a file is malformed, or a helper fails.
    """
    await trio.lowlevel.checkpoint()
    keys = keys_of(registry)
    for path in auth_files():
        file = await trio.to_thread.run_sync(AuthFile.read, path)
        if (helper := file.helper(keys)) is not None:
            program, key = helper
            if (answer := await ask_helper(program, key)) is not None:
                name, secret = answer
                if name == _TOKEN_NAME:
                    return Credentials(identity_token=secret)
                return Credentials(username=name, password=secret)
        if (entry := file.entry(keys)) is not None:
            return Credentials(
                username=entry.username, password=entry.password, identity_token=entry.token
            )
    return None


async def store_credentials(registry: str, credentials: Credentials) -> Path | str:
    """Keep credentials for ``HOST[:PORT]``. Give the file, or the helper program's name.

    They go to the first of the files of :func:`find_credentials`, or to the helper program that
    this file names. The file is replaced as a whole.

    :raises ConfigError: the file is malformed or cannot be written, or the helper fails.
    """
    registry = normalise_key(registry)
    async with locked(home() / "credentials.lock"):
        path = auth_files()[0]
        file = await trio.to_thread.run_sync(AuthFile.read, path)
        if (helper := file.helper([registry], to_store=True)) is not None:
            program, key = helper
            name, secret = credentials.username, credentials.password
            if credentials.identity_token is not None:
                name, secret = _TOKEN_NAME, credentials.identity_token
            await tell_helper(program, key, name, secret)
            return program
        file.set(registry, credentials.username, credentials.password, credentials.identity_token)
        await trio.to_thread.run_sync(file.write)
        return path


async def erase_credentials(registry: str) -> bool:
    """Forget credentials for ``HOST[:PORT]`` in all places. Give whether there were any.

    :raises ConfigError: a file is malformed or cannot be written, or a helper fails.
    """
    registry = normalise_key(registry)
    found = False
    failed: ConfigError | None = None
    async with locked(home() / "credentials.lock"):
        for path in auth_files():
            try:
                file = await trio.to_thread.run_sync(AuthFile.read, path)
                if (helper := file.helper([registry], to_store=True)) is not None:
                    program, key = helper
                    if await ask_helper(program, key) is not None:
                        await forget_in_helper(program, key)
                        found = True
                if file.remove(registry):
                    await trio.to_thread.run_sync(file.write)
                    found = True
            except ConfigError as exc:
                failed = failed or exc
    if failed is not None:
        raise failed
    return found
