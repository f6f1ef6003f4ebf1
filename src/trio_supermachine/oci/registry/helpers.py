"""Helper programs ``docker-credential-NAME``, which keep credentials, and their protocol."""

from __future__ import annotations

import json
import re
import subprocess

import trio

from ..._util.process import run_process
from ...errors import ConfigError
from ..names import show_text

_TIMEOUT = 60  # seconds; a person may have to unlock the store


async def ask_helper(name: str, key: str) -> tuple[str, str] | None:
    """Ask a helper for the name and the secret that it has for ``key``, if any.

    :raises ConfigError: the helper is not there, fails, or gives an answer of another form.
    """
    done = await _run(name, "get", key)
    if done.returncode != 0:
        said = done.stdout.decode(errors="replace")
        if "credentials not found" in said.lower():
            return None
        raise _failure(name, "get", done)
    try:
        answer = json.loads(done.stdout)
        user, secret = answer["Username"], answer["Secret"]
    except (ValueError, RecursionError, KeyError, TypeError):
        user = secret = None
    if not isinstance(user, str) or not isinstance(secret, str):
        raise ConfigError(f"docker-credential-{name} get: the answer makes no sense")
    return (user, secret) if user else None


async def tell_helper(name: str, key: str, user: str, secret: str) -> None:
    """Let a helper keep credentials.

    :raises ConfigError: the helper is not there, or fails.
    """
    document = json.dumps({"ServerURL": key, "Username": user, "Secret": secret})
    done = await _run(name, "store", document)
    if done.returncode != 0:
        raise _failure(name, "store", done)


async def forget_in_helper(name: str, key: str) -> None:
    """Let a helper forget credentials.

    :raises ConfigError: the helper is not there, or fails.
    """
    done = await _run(name, "erase", key)
    if done.returncode != 0:
        raise _failure(name, "erase", done)


async def _run(name: str, action: str, stdin: str) -> subprocess.CompletedProcess[bytes]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", name):
        raise ConfigError(f"{name[:128]!r} is not the name of a credential helper")
    program = f"docker-credential-{name}"
    try:
        with trio.fail_after(_TIMEOUT):
            return await run_process(
                [program, action],
                stdin=stdin.encode(),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
    except trio.TooSlowError:
        raise ConfigError(f"{program} {action} took more than {_TIMEOUT} s") from None
    except OSError as exc:
        raise ConfigError(
            f"{program} cannot be run: {exc.strerror}; install it, or remove it from the file of"
            " credentials that names it"
        ) from exc


def _failure(name: str, action: str, done: subprocess.CompletedProcess[bytes]) -> ConfigError:
    said = (done.stderr or done.stdout).decode(errors="replace").strip()
    return ConfigError(
        f"docker-credential-{name} {action} failed ({done.returncode}):"
        f" {show_text(said) or 'silently'}"
    )
