"""Prints where the time of the last scripts/test or .ci/run went.

    scripts/durations.py [DIRECTORY]

DIRECTORY (default: .durations) has parts.jsonl, which scripts/parts.py writes, and a directory for
each part with what tests/support/durations.py wrote there.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SLOWEST = 25

Row = tuple[str, float, float]  # a name, seconds of wall time, seconds of CPU


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one on each line; a run that was ended may have cut the last."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def summed(phases: list[dict[str, Any]], name: str) -> list[Row]:
    """Rows of what has the same ``name``, the longest first."""
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0])
    for phase in phases:
        sums[phase[name]][0] += phase["wall"]
        sums[phase[name]][1] += phase["cpu"]
    rows = [(key, wall, cpu) for key, (wall, cpu) in sums.items()]
    return sorted(rows, key=lambda row: -row[1])


def table(title: str, rows: list[Row]) -> str:
    lines = [f"{title:<80} {'wall s':>8} {'CPU s':>8}"]
    lines += [f"  {name:<78.78} {wall:8.1f} {cpu:8.1f}" for name, wall, cpu in rows]
    return "\n".join(lines)


def report(directory: Path) -> str:
    """All tables."""
    parts: list[Row] = []
    phases: list[dict[str, Any]] = []
    for part in read(directory / "parts.jsonl"):
        parts.append((part["part"], part["wall"], part["cpu"]))
        for path in sorted((directory / part["part"]).glob("*.jsonl")):
            lines = list(read(path))
            tests = [
                line | {"file": line["test"].split("::")[0]} for line in lines if "test" in line
            ]
            for line in lines:
                if line["phase"] == "session":
                    count = len({test["test"] for test in tests})
                    parts.append((f"  {path.stem}: {count} tests", line["wall"], line["cpu"]))
            suffix = f" ({part['part']})"
            phases += [
                line | {key: line[key] + suffix for key in ("test", "file")} for line in tests
            ]
    return "\n\n".join(
        [
            table("parts", parts),
            table(f"the {SLOWEST} slowest files", summed(phases, "file")[:SLOWEST]),
            table(f"the {SLOWEST} slowest tests", summed(phases, "test")[:SLOWEST]),
        ]
    )


if __name__ == "__main__":
    print(report(Path(sys.argv[1] if len(sys.argv) > 1 else ".durations")))
