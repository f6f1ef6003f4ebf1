"""Bars of the main figures beside their baselines, from what other benchmarks wrote by ``--json``.

Reads ``NAME.json`` of each benchmark from ``docs/data``, or the directory ``--data``, and writes
``performance.svg`` there, or the file ``--out``. With ``--smoke`` the picture is not kept.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import attrs
from common import Unavailable, scratch, start
from table import Rows

DATA = Path(__file__).resolve().parent.parent / "docs" / "data"

#: What is shown: the benchmark, its row, the title, and what the baseline is called.
FIGURES = (
    (
        "boot",
        "boot to the agent's greeting",
        "Boot until the guest answers",
        "a busybox of QEMU by hand",
    ),
    (
        "restore",
        "nothing to the first exec, after a warm-up",
        "Restore until the first program has ended",
        "QEMU, restored by hand",
    ),
    ("pool", "hand-over of an idle warm VM", "Hand-over of a pool's VM", "restore without a pool"),
    ("streams", "run_process(['true'])", "One program in a running VM", "the same on the host"),
    ("streams", "stdout of an exec", "A program's output", "a raw port of QEMU"),
)

WIDTH, LEFT, RIGHT, BAR, GAP, HEAD = 760, 230, 150, 18, 4, 24
OURS, THEIRS, TEXT, FAINT = "#3b6fb6", "#b9bfc9", "#222222", "#666666"


@attrs.frozen
class Bar:
    """A measured value: of the library, or of what it is compared with."""

    label: str
    value: float
    color: str


@attrs.frozen
class Figure:
    """Bars of one unit on a scale of their own."""

    title: str
    unit: str
    bars: Sequence[Bar]
    p99: float


def row_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    """The row of that name, in the last table that has one beside a baseline."""
    for table in reversed(document["tables"]):
        for row in table["rows"]:
            if row["name"] == name and row["baseline"] is not None:
                found: dict[str, Any] = row
                return found
    raise Unavailable(f"{document['benchmark']}: no row {name!r} with a baseline")


def read(data: Path, benchmark: str) -> dict[str, Any]:
    file = data / f"{benchmark}.json"
    try:
        document: dict[str, Any] = json.loads(file.read_bytes())
    except FileNotFoundError:
        how = f"python benchmarks/{benchmark}.py --json {file}"
        raise Unavailable(f"needs {file}: {how}") from None
    return document


def figure(row: dict[str, Any], title: str, beside: str) -> Figure:
    bars = (
        Bar(f"trio-supermachine, {row['engine']}", row["median"], OURS),
        Bar(beside, row["baseline"]["median"], THEIRS),
    )
    return Figure(title, row["unit"], bars, row["p99"])


def shown(value: float, unit: str) -> str:
    """A value with as many digits as say something."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 1 else 2}f} {unit}"


def text(x: float, y: float, words: str, **attributes: str) -> str:
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(words)}</text>'


def draw(figures: Sequence[Figure], caption: str) -> str:
    """The picture, as SVG."""
    lines = []
    y = 8
    for one in figures:
        better = "more is better" if one.unit.endswith("/s") else "less is better"
        lines.append(text(8, y + 14, one.title, font_weight="bold"))
        lines.append(text(WIDTH - 8, y + 14, better, fill=FAINT, text_anchor="end"))
        y += HEAD
        most = max(one.p99, *(bar.value for bar in one.bars))
        scale = (WIDTH - LEFT - RIGHT) / most
        for number, bar in enumerate(one.bars):
            length = max(bar.value * scale, 1)
            lines.append(text(LEFT - 8, y + 13, bar.label, text_anchor="end"))
            lines.append(
                f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{bar.color}"/>'
            )
            value, end = shown(bar.value, one.unit), length
            if not number:  # the 99th percentile is a line
                value += f" (p99 {shown(one.p99, '').strip()})"
                end = max(length, one.p99 * scale)
                ends = f'x1="{LEFT + length:.1f}" x2="{LEFT + one.p99 * scale:.1f}"'
                middle = f'y1="{y + BAR / 2:g}" y2="{y + BAR / 2:g}"'
                lines.append(f'<line {ends} {middle} stroke="{FAINT}"/>')
            lines.append(text(LEFT + end + 6, y + 13, value))
            y += BAR + GAP
        y += 14
    lines.append(text(8, y + 6, caption, fill=FAINT, font_size="10"))
    y += 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}"'
        f' height="{y}" font-family="sans-serif" font-size="12" fill="{TEXT}">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )


async def main(data: str, out: str) -> AsyncIterator[Rows]:
    place = Path(data) if data else DATA
    rows = Rows(title="what is drawn")
    figures, smoke = [], False
    for benchmark, name, title, beside in FIGURES:
        document = read(place, benchmark)
        row = row_of(document, name)
        figures.append(figure(row, title, beside))
        rows.compare(title, f"{title}: {beside}")
        rows.add(title, row["median"], row["unit"], by=row["engine"])
        baseline = row["baseline"]
        rows.add(f"{title}: {beside}", baseline["median"], row["unit"], by=baseline["engine"])
        smoke |= document["smoke"]
    host = document["host"]
    caption = f"{host['processors']} x {host['processor']}, {host['system']}, {document['date']}"
    caption = "A smoke run: these numbers say nothing." if smoke else caption
    with scratch() as temporary:
        kept = {"": place / "performance.svg", "-": temporary / "performance.svg"}
        file = kept.get(out, Path(out))
        file.write_text(draw(figures, caption))
    yield rows


if __name__ == "__main__":
    start(main, __doc__, data=("", ""), out=("", "-"))
