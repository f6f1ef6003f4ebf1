"""The grammar of ``login`` and ``logout``."""

from __future__ import annotations

import click

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
    from ..login import login

    login(registry, username, password_stdin=password_stdin)


@click.command("logout")
@_registry
def logout_command(registry: str) -> None:
    """Forget the name and password for REGISTRY."""
    from ..login import logout

    logout(registry)
