"""Requests to one endpoint: authenticated, and led by redirects within limits.

The first request finds out the scheme: HTTPS, or plain HTTP if the configuration allows that and
the host does not speak TLS. ``Authorization`` goes to the origin of the endpoint only, and to token
servers; a redirect to another origin loses it. A redirect never leads from HTTPS to HTTP, in
circles, or to an address with a password.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

import httpx
import trio

from ...errors import RegistryError
from ..names import show_text
from .challenge import parse_challenges
from .endpoints import Endpoint
from .retry import Transient
from .tokens import Authorizer, FindCredentials
from .wire import Answer, Wire, authority, speaks_no_tls

_MAX_REDIRECTS: Final = 10
_MAX_CHALLENGES: Final = 2  # of one request: the first, and one for a token that has expired
_REDIRECTS: Final = (301, 302, 303, 307, 308)


@final
class Host:
    """An endpoint that can be asked.

    :param scope: the scope that its tokens are asked for; ``None`` for none.
    """

    def __init__(
        self, endpoint: Endpoint, wire: Wire, credentials: FindCredentials, scope: str | None
    ) -> None:
        self.endpoint = endpoint
        self.authorizer: Authorizer = Authorizer(self, endpoint.name, scope, credentials)
        self._wire = wire
        self._lock = trio.Lock()
        self._base: httpx.URL | None = None

    async def request(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        """Send a request for a path below ``/v2/``, and give an answer that is no redirect.

        :raises Transient: no answer came.
        :raises RegistryError: a redirect or a challenge is not acceptable.
        """
        base = await self._settled()
        url = base.copy_with(path="/v2/" + path)
        challenged = 0
        while True:
            sent = await self.authorizer.header()
            authorized = headers if sent is None else {**headers, "Authorization": sent}
            answer = await self._follow(method, url, headers, authorized)
            if answer.status != 401 or not _same_origin(answer.url, base):
                return answer
            challenges = parse_challenges(answer.headers("WWW-Authenticate"))
            challenged += 1
            if challenged > _MAX_CHALLENGES:
                return answer
            try:
                again = await self.authorizer.challenged(challenges, sent)
            except BaseException:
                await answer.aclose()
                raise
            if not again:
                return answer
            await answer.aclose()

    async def ask(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request to a token server, which may get a secret."""
        if url.scheme != "https" and not self.endpoint.plain_allowed:
            raise self._refused(f"names a token server without TLS: {show_text(str(url), 128)}")
        if form is not None:
            return await self._wire.send(method, url, headers, own=False, form=form)
        bare = {name: value for name, value in headers.items() if name != "Authorization"}
        return await self._follow(method, url, bare, headers)

    async def _follow(
        self, method: str, url: httpx.URL, bare: Mapping[str, str], full: Mapping[str, str]
    ) -> Answer:
        """Send a request, and follow redirects. Only the first origin gets the ``full`` headers."""
        first, seen = url, {url}
        while True:
            at_home = _same_origin(url, first)
            own = self._base is not None and _same_origin(url, self._base)
            answer = await self._wire.send(method, url, full if at_home else bare, own=own)
            if answer.status not in _REDIRECTS:
                return answer
            location = answer.header("Location")
            await answer.aclose()
            url = self._next(url, location)
            if url in seen or len(seen) > _MAX_REDIRECTS:
                raise self._refused("redirects in circles, or too often")
            seen.add(url)

    def _next(self, url: httpx.URL, location: str | None) -> httpx.URL:
        try:
            found = url.join(location or "")
        except (httpx.InvalidURL, ValueError):
            found = httpx.URL()
        if not location or found.scheme not in ("http", "https") or not found.host:
            raise self._refused(
                f"redirects to an impossible address: {show_text(str(location), 128)!r}"
            )
        if found.userinfo:
            raise self._refused(f"redirects to an address with a password, on {found.host}")
        if url.scheme == "https" and found.scheme != "https":
            raise self._refused(f"redirects from HTTPS to plain HTTP, on {authority(found)}")
        return found

    async def _settled(self) -> httpx.URL:
        """Give the endpoint's address. Find out its scheme if plain HTTP will do."""
        async with self._lock:
            if self._base is None:
                secure = httpx.URL(f"https://{self.endpoint.host}/v2/")
                if self.endpoint.plain_allowed and await self._is_plain(secure):
                    self._base = secure.copy_with(scheme="http")
                else:
                    self._base = secure
            return self._base

    async def _is_plain(self, secure: httpx.URL) -> bool:
        try:
            answer = await self._wire.send("GET", secure, {}, own=True)
        except Transient as failure:
            if speaks_no_tls(failure):
                return True
            # A server without TLS may simply hang up. What is sent now is no secret.
            plain = await self._wire.send("GET", secure.copy_with(scheme="http"), {}, own=True)
            await plain.aclose()
            if plain.status == 400:  # as servers answer that do want TLS
                raise
            return True
        await answer.aclose()
        return False

    def _refused(self, what: str) -> RegistryError:
        name = self.endpoint.name
        return RegistryError(f"{name} {what}; ask who runs it", registry=name)


def _same_origin(a: httpx.URL, b: httpx.URL) -> bool:
    return (a.scheme, a.host, _port(a)) == (b.scheme, b.host, _port(b))


def _port(url: httpx.URL) -> int | None:
    return url.port or {"http": 80, "https": 443}.get(url.scheme)
