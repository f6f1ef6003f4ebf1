"""Failures: exceptions for HTTP statuses that are no success."""

from __future__ import annotations

import json
from typing import Final

from ...errors import RegistryError
from ..names import show_text
from .retry import Transient
from .wire import Answer, authority

_MAX_BODY: Final = 8 << 10  # bytes of an error's body that are looked at


async def failure_of(
    answer: Answer, what: str, *, registry: str, known: bool
) -> RegistryError | Transient:
    """Make the exception for an answer that refuses ``what``.

    :param registry: the name to log in to.
    :param known: whether there are credentials for it.
    """
    host = authority(answer.url)
    said = await said_by(answer)
    begin = f"{host} answered {answer.reason} for {what}" + (f" ({said})" if said else "")
    error = RegistryError(
        f"{begin}; {_remedy(answer.status, host, registry, known)}",
        registry=host,
        status=answer.status,
    )
    if answer.status in (408, 429) or answer.status >= 500:
        return Transient(error, answer.retry_after)
    return error


def _remedy(status: int, host: str, registry: str, known: bool) -> str:
    login = f"trio-supermachine login {registry}"
    if status in (401, 403) and known:
        return f"the credentials for it are wrong, or do not suffice; {login} takes others"
    if status in (401, 403):
        return f"it may need credentials, which {login} takes, or not exist"
    if status == 429:
        return "try later; registries allow more to those who log in"
    if status == 408 or status >= 500:
        return "try later"
    return f"check the reference, and whether {host} is a registry"


async def said_by(answer: Answer) -> str:
    """Read the messages in an error's body, for people; empty if there are none.

    See the OCI distribution specification, error codes.
    """
    try:
        body = await answer.read(_MAX_BODY)
    except Transient:
        return ""
    try:
        document = json.loads(body or b"")
    except (ValueError, RecursionError):
        return ""
    errors = document.get("errors") if isinstance(document, dict) else None
    messages = []
    for error in errors[:3] if isinstance(errors, list) else ():
        if isinstance(error, dict):
            message = error.get("message") or error.get("code")
            if isinstance(message, str) and message:
                messages.append(show_text(message, 200))
    return ", ".join(messages)
