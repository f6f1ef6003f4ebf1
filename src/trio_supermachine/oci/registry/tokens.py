"""The value of ``Authorization``: a password, or a token that a token server gives for it.

The protocol is that of the distribution project's token authentication, which all registries
share. A ``Bearer`` challenge names a token server (``realm``). The server gives a token for a
service and a scope, for a password by GET, or for an identity token by POST (OAuth 2).

An :class:`Authorizer` begins without credentials and sends nothing. The first challenge makes it
look for credentials, once. After a ``Bearer`` challenge it sends tokens, and fetches a new one when
the old one expires or is refused; after a ``Basic`` challenge it sends the password. The lock makes
tasks that are refused at once wait for one token.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol

import attrs
import httpx
import trio

from ...errors import RegistryError
from ..names import show_text
from .challenge import Challenge
from .credentials import Credentials
from .failures import failure_of
from .wire import Answer, authority

_MAX_ANSWER: Final = 1 << 20  # bytes
_MAX_TOKEN: Final = 64 << 10  # characters that a header may have
_DEFAULT_LIFE: Final = 60.0  # seconds that a token lives, unless its server says more
_MARGIN: Final = 10.0  # seconds before its end from which a token counts as expired
_PULL = re.compile(r"repository(?:\([a-z]+\))?:[A-Za-z0-9._/:\-]{1,512}:pull")


FindCredentials = Callable[[], Awaitable[Credentials | None]]


class Sender(Protocol):
    """Sends requests to token servers. It follows safe redirects only."""

    async def ask(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one request."""


@attrs.frozen
class _Token:
    text: str
    expires: float  # of Trio's clock


class Authorizer:
    """The authorization at one endpoint.

    :param scope: the scope that tokens are asked for. A registry may name another repository to
        pull from, and nothing else.
    :param find: finds credentials, when a challenge wants them.
    """

    def __init__(self, sender: Sender, host: str, scope: str | None, find: FindCredentials) -> None:
        self._sender = sender
        self._host = host
        self._scope = scope
        self._find = find
        self._found = False
        self._credentials: Credentials | None = None
        self._lock = trio.Lock()
        self._basic: str | None = None
        self._bearer: Challenge | None = None
        self._tokens: dict[tuple[str, str, str], _Token] = {}

    @property
    def has_credentials(self) -> bool:
        """Whether credentials were found, if a challenge has wanted any."""
        return self._credentials is not None

    async def header(self) -> str | None:
        """Give the value to send now; ``None`` to send none."""
        async with self._lock:  # concurrent requests wait for one token
            if self._bearer is not None:
                return await self._from_token_server(self._bearer)
            return self._basic

    async def challenged(self, challenges: Sequence[Challenge], sent: str | None) -> bool:
        """Take the refusal of a request. Give whether to try again, with another :meth:`header`.

        :param sent: the header's value in that request.
        :raises RegistryError: the token server refuses, or breaks the protocol.
        """
        async with self._lock:
            if not self._found:
                self._credentials = await self._find()
                self._found = True
            bearer = next((c for c in challenges if c.scheme == "bearer"), None)
            if bearer is not None:
                self._bearer = bearer
                key = self._key(bearer)
                if (token := self._tokens.get(key)) is not None:
                    if f"Bearer {token.text}" != sent:
                        return True  # another task has fetched a new token meanwhile
                    del self._tokens[key]
                return await self._from_token_server(bearer) != sent
            if any(c.scheme == "basic" for c in challenges):
                self._bearer, self._basic = None, self._password()
                return self._basic not in (None, sent)
            return False

    def _password(self) -> str | None:
        known = self._credentials
        if known is None or known.identity_token is not None:
            return None
        text = f"{known.username}:{known.password}".encode()
        return "Basic " + base64.b64encode(text).decode()

    def _key(self, challenge: Challenge) -> tuple[str, str, str]:
        found = challenge.parameters
        scope = found.get("scope", "")
        if self._scope is None or not _PULL.fullmatch(scope):
            scope = self._scope or ""
        return found.get("realm", ""), found.get("service", ""), scope

    async def _from_token_server(self, challenge: Challenge) -> str:
        key = self._key(challenge)
        token = self._tokens.get(key)
        if token is None or trio.current_time() >= token.expires:
            self._tokens.pop(key, None)
            token = self._tokens[key] = await self._fetch(*key)
        return f"Bearer {token.text}"

    async def _fetch(self, realm: str, service: str, scope: str) -> _Token:
        try:
            url = httpx.URL(realm)
        except (httpx.InvalidURL, ValueError):
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise self._nonsense(f"names no proper token server: {show_text(realm, 128)!r}")
        asked = {name: value for name, value in (("service", service), ("scope", scope)) if value}
        known = self._credentials
        if known is not None and known.identity_token is not None:
            form = {
                **asked,
                "grant_type": "refresh_token",
                "client_id": "trio-supermachine",
                "refresh_token": known.identity_token,
            }
            answer = await self._sender.ask("POST", url, {}, form)
        else:
            password = self._password()
            headers = {} if password is None else {"Authorization": password}
            answer = await self._sender.ask("GET", url.copy_merge_params(asked), headers)
        try:
            if answer.status != 200:
                raise await failure_of(
                    answer,
                    f"a token for {self._host}",
                    registry=self._host,
                    known=self.has_credentials,
                )
            return self._parse(await answer.read(_MAX_ANSWER), url)
        finally:
            await answer.aclose()

    def _parse(self, body: bytes | None, url: httpx.URL) -> _Token:
        try:
            document = json.loads(body or b"")
        except (ValueError, RecursionError):
            document = None
        found = document if isinstance(document, dict) else {}
        text = found.get("token") or found.get("access_token")
        # The token becomes a part of a header.
        if not isinstance(text, str) or not re.fullmatch(rf"[!-~]{{1,{_MAX_TOKEN}}}", text):
            raise self._nonsense(f"has a token server, {authority(url)}, that gives no token")
        life = found.get("expires_in")
        if not isinstance(life, int | float) or not 0 < life < 1e9:
            life = _DEFAULT_LIFE
        # A short-lived token has to be of use, too, in spite of the margin.
        return _Token(text, trio.current_time() + max(life - _MARGIN, life / 2))

    def _nonsense(self, what: str) -> RegistryError:
        return RegistryError(f"{self._host} {what}; ask who runs it", registry=self._host)
