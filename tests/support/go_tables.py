"""Reads the tables of cases in Go tests that Debian packages, so that their cases are ours too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

GOCODE = Path("/usr/share/gocode/src/github.com")
_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
    |(?P<raw>`[^`]*`)
    |(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<number>[0-9]+)
    |(?P<name>[A-Za-z_][A-Za-z0-9_.]*)
    |(?P<sign>.)""",
    re.VERBOSE | re.DOTALL,
)


def source(path: str, package: str) -> str:
    """The text of a Go file. The test is skipped where its package is not installed."""
    file = GOCODE / path
    if not file.exists():
        pytest.skip(f"needs Debian's {package}")
    return file.read_text()


def function(text: str, name: str) -> str:
    """The text of one function, and what stands before the next one."""
    start = text.index(f"\nfunc {name}(")
    end = text.find("\nfunc ", start + 1)
    return text[start : len(text) if end < 0 else end]


def table(text: str, after: str) -> list[Any]:
    """The list that begins at the first ``{`` that follows ``after`` and a type, if there is one.

    Structs become dictionaries, and names such as ``nil`` or ``ErrNameEmpty`` become their text.
    """
    start = text.index(after) + len(after)
    if declared := re.compile(r"\s*struct \{.*?\n\s*\}", re.DOTALL).match(text, start):
        start = declared.end()
    found = _Values(text[text.index("{", start) :]).value()
    assert isinstance(found, list)
    assert found
    return found


class _Values:
    """A parser of composite literals, as far as tables use them."""

    def __init__(self, text: str) -> None:
        self._tokens = self._scan(text)
        self._next = next(self._tokens)

    def value(self) -> Any:
        result = self._term()
        while self._take("+"):
            result += self._term()
        return result

    @staticmethod
    def _scan(text: str) -> Iterator[tuple[str, str]]:
        for match in _TOKEN.finditer(text):
            if match.lastgroup != "space":
                assert match.lastgroup is not None
                yield match.lastgroup, match.group()
        yield "end", ""

    def _advance(self) -> tuple[str, str]:
        token, self._next = self._next, next(self._tokens, ("end", ""))
        return token

    def _take(self, sign: str) -> bool:
        if self._next != ("sign", sign):
            return False
        self._advance()
        return True

    def _term(self) -> Any:
        if self._take("["):  # a slice's type stands before its values
            assert self._take("]")
            self._advance()
        kind, text = self._advance()
        if kind == "raw":
            return text[1:-1]
        if kind == "string":
            return ast.literal_eval(text)
        if kind == "number":
            return int(text)
        if kind == "name":
            return self._named(text)
        assert (kind, text) == ("sign", "{"), f"not a value: {text!r}"
        return self._composite()

    def _named(self, text: str) -> Any:
        if self._take("("):
            arguments = [self.value()]
            while self._take(","):
                arguments.append(self.value())
            assert self._take(")")
            return arguments[0] * arguments[1] if text == "strings.Repeat" else arguments[0]
        if self._take("{"):
            return self._composite()
        return {"true": True, "false": False, "nil": None}.get(text, text)

    def _composite(self) -> Any:
        items: list[Any] = []
        fields: dict[str, Any] = {}
        while not self._take("}"):
            item = self.value()
            if self._take(":"):
                fields[item] = self.value()
            else:
                items.append(item)
            self._take(",")
        assert not (items and fields)
        return fields or items
