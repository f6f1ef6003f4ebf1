"""``trio-supermachine login`` and ``logout``: credentials for registries."""

from __future__ import annotations

import sys

import click

from ..errors import ConfigError
from .interrupts import run_until_signal

_MAX_PASSWORD = 1 << 16
_registry = click.argument("registry", default="docker.io")


@click.command("login")
@click.option("-u", "--username", metavar="NAME", help="Asked for on the terminal by default.")
@click.option("--password-stdin", is_flag=True, help="Read the password from stdin.")
@_registry
def login_command(registry: str, username: str | None, password_stdin: bool) -> None:
    """Show a name and password to REGISTRY (HOST[:PORT]), and keep them if it takes them.

    They are kept where Docker keeps its own (~/.docker/config.json, or the helper program that
    this names), or in $REGISTRY_AUTH_FILE if that is set, and used for each pull. Many
    registries take a token in place of a password.
    """
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
    from ..oci.registry import Credentials, check_credentials, store_credentials

    credentials = Credentials(username=username, password=password)
    await check_credentials(registry, credentials)
    return str(await store_credentials(registry, credentials))


@click.command("logout")
@_registry
def logout_command(registry: str) -> None:
    """Forget the name and password for REGISTRY."""
    if not run_until_signal(_logout, registry):
        raise ConfigError(f"there are no credentials for {registry!r} here")


async def _logout(registry: str) -> bool:
    from ..oci.registry import erase_credentials

    return await erase_credentials(registry)
