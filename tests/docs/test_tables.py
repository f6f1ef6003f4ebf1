"""Rows of simple tables are whole: a line with text in its first column begins a row of its own.

So a first cell of two lines becomes two rows, and the second has an empty cell, or the first ends
with a comma. Such a table is a grid table or a ``list-table``. A cell without a value has a dash.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
_BORDER = re.compile(r" *=+(?: +=+)+")


def broken_rows(text: str) -> Iterator[str]:
    """Lines of simple tables that begin a row and are not whole."""
    starts: list[int] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if _BORDER.fullmatch(line):
            is_last = not "".join(lines[number + 1 : number + 2]).strip()
            starts = [] if is_last else [column.start() for column in re.finditer("=+", line)]
        elif starts:
            ends = [*starts[1:], None]
            cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
            if cells[0] and (not all(cells) or cells[0].endswith(",")):
                yield line


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.rst")), ids=lambda page: page.stem)
def test_a_row_of_a_simple_table_begins_with_one_line(page: Path) -> None:
    assert list(broken_rows(page.read_text())) == []


@pytest.mark.parametrize(
    ("row", "broken"),
    [
        ("a value   its meaning", []),
        ("a value   its meaning\n          goes on", []),
        ("a value   its meaning\nand more", ["and more"]),
        ("a value,  its meaning\nanother   goes on", ["a value,  its meaning"]),
    ],
)
def test_a_broken_row_is_found(row: str, broken: list[str]) -> None:
    border = "========  ============="
    table = f"{border}\nWhat      Meaning\n{border}\n{row}\n{border}\n"
    assert list(broken_rows(f"Text.\n\n{table}\nMore text.\n")) == broken
