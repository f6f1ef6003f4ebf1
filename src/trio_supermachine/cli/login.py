"""``trio-supermachine login`` and ``logout``: credentials for registries."""

from __future__ import annotations

import sys

import click

from ..errors import ConfigError
from ..oci.registry import Credentials, check_credentials, erase_credentials, store_credentials
from .interrupts import run_until_signal

_MAX_PASSWORD = 1 << 16


def login(registry: str, username: str | None, *, password_stdin: bool) -> None:
    """Check a name and password with a registry, and keep them."""
    if password_stdin:
        if username is None:
            raise click.UsageError("--password-stdin needs --username")
        password = sys.stdin.read(_MAX_PASSWORD).rstrip("\r\n")
    else:
        if not sys.stdin.isatty():
            raise click.UsageError("there is no terminal to ask on; give --password-stdin")
        username = username or click.prompt("Username", err=True)
        password = click.prompt("Password", hide_input=True, err=True)
    if not password:
        raise click.UsageError("the password is empty")
    where = run_until_signal(_login, registry, username, password)
    click.echo(f"kept in {where}", err=True)


async def _login(registry: str, username: str, password: str) -> str:
    credentials = Credentials(username=username, password=password)
    await check_credentials(registry, credentials)
    return str(await store_credentials(registry, credentials))


def logout(registry: str) -> None:
    """Forget the credentials for a registry. :raises ConfigError: there are none."""
    if not run_until_signal(erase_credentials, registry):
        raise ConfigError(f"there are no credentials for {registry!r} here")
