"""Parser of ``WWW-Authenticate`` (RFC 9110, section 11.6.1).

A challenge is a scheme with parameters, or with a *token68*. Several challenges, and several
parameters, are separated by commas alone, so the parser looks ahead to tell them apart. Malformed
headers are no error: the challenges before the fault count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import attrs

_MAX = 16 << 10  # characters of one header
_MAX_CHALLENGES = 16
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TOKEN68 = re.compile(r"[A-Za-z0-9\-._~+/]+=*(?=[ \t]*(?:,|$))")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_SPACE = re.compile(r"[ \t]*")
_COMMAS = re.compile(r"[ \t,]*")


@attrs.frozen
class Challenge:
    """A way to authenticate. The scheme and the parameters' names are in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """Parse the challenges of some headers. Of a malformed one, take those before the fault."""
    found: list[Challenge] = []
    for header in headers:
        if len(header) <= _MAX:
            _Parser(header).run(found)
    return found[:_MAX_CHALLENGES]


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def run(self, found: list[Challenge]) -> None:
        self._take(_COMMAS)
        while len(found) < _MAX_CHALLENGES and (scheme := self._take(_TOKEN)) is not None:
            parameters: dict[str, str] = {}
            found.append(Challenge(scheme[0].lower(), parameters))
            spaces = self._take(_SPACE)
            assert spaces is not None
            if spaces[0] and not self._parameter_follows():
                self._take(_TOKEN68)
            while self._parameter_follows():
                if not self._parameter(parameters):
                    return
                self._take(_COMMAS)
            self._take(_COMMAS)

    def _parameter_follows(self) -> bool:
        # The next parameter and the next challenge both begin with a token.
        here = self._at
        name = self._take(_TOKEN)
        self._take(_SPACE)
        follows = name is not None and self._text[self._at : self._at + 1] == "="
        if follows and re.compile(r"=*[ \t]*(?:,|$)").match(self._text, self._at):
            follows = False  # padding of a token68
        self._at = here
        return follows

    def _parameter(self, parameters: dict[str, str]) -> bool:
        name = self._take(_TOKEN)
        self._take(_SPACE)
        assert name is not None
        self._at += 1
        self._take(_SPACE)
        if (quoted := self._take(_QUOTED)) is not None:
            value = re.sub(r"\\(.)", r"\1", quoted[1], flags=re.DOTALL)
        elif (token := self._take(_TOKEN)) is not None:
            value = token[0]
        else:
            return False
        parameters.setdefault(name[0].lower(), value)
        return True

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._text, self._at)
        if match is not None:
            self._at = match.end()
        return match
