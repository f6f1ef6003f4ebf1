"""The code of the documentation, and what its pages say about running it.

A comment right before a block says what the reader need not see:

- ``.. not run: REASON``: the block is only compiled;
- ``.. file: NAME``: the block is the content of that file, for the blocks after it;
- ``.. run in``, with code below it: the block runs in the place of the line ``HERE`` there.

In Markdown the comment is ``<!-- not run: REASON -->``. Without a comment, a block of Python is a
whole program.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import attrs

_COMMENT = re.compile(r" *(?:\.\.|<!--) (run in|not run|file)(?:: *(.*?))?(?: *-->)?")
_BLOCK = re.compile(r" *(?:\.\. code-block:: |```)(\w+)")


@attrs.frozen
class Block:
    """A block of code, and the comment before it: ``kind`` is ``""`` without one."""

    page: Path
    line: int
    language: str
    text: str
    kind: str = ""
    value: str = ""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def whole(self) -> str:
        """The block with what is around it, on the lines that it has in the page."""
        if self.kind != "run in":
            return "\n" * (self.line - 1) + self.text
        before, after = re.split(r"^(?: *)HERE$", self.value, maxsplit=1, flags=re.MULTILINE)
        indent = re.search(r"^( *)HERE$", self.value, flags=re.MULTILINE)
        assert indent is not None
        start = self.line - 1 - before.count("\n")
        assert start >= 0, f"{self}: the code around this block is longer than the page above it"
        return "\n" * start + before + textwrap.indent(self.text, indent[1]) + after


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page in RST or Markdown."""
    return list(_blocks(page, page.read_text().splitlines()))


def _blocks(page: Path, lines: list[str]) -> Iterator[Block]:
    number = 0
    comment: re.Match[str] | None = None
    around = ""
    while number < len(lines):
        line = lines[number]
        number += 1
        if found := _COMMENT.fullmatch(line):
            assert comment is None, f"{page}:{number}: two comments about one block"
            comment = found
            around, number = _indented(lines, number)
        elif found := _BLOCK.fullmatch(line):
            if line.lstrip().startswith("```"):
                end = lines.index("```", number)
                text, number = "\n".join(lines[number:end]) + "\n", end + 1
                first = end - text.count("\n") + 1
            else:
                text, number = _indented(lines, number)
                first = number - text.count("\n") + 1
            kind, value = ("", "") if comment is None else (comment[1], comment[2] or "")
            yield Block(page, first, found[1], text, kind, around if kind == "run in" else value)
            comment = None
        elif line.strip():
            assert comment is None, f"{page}:{number}: no block follows the comment"


def _indented(lines: list[str], start: int) -> tuple[str, int]:
    """The lines from ``start`` on that are indented as the first of them, and where they end."""
    first = start
    while first < len(lines) and not lines[first].strip():
        first += 1
    margin = len(lines[first]) - len(lines[first].lstrip()) if first < len(lines) else 0
    end = first
    while margin and end < len(lines) and (lines[end][:margin].isspace() or not lines[end]):
        end += 1
    while end > first and not lines[end - 1].strip():
        end -= 1
    if end == first:
        return "", start
    return textwrap.dedent("\n".join(lines[first:end])) + "\n", end
