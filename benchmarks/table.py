"""Measured values, the table that shows them, and the file that keeps them.

A row is one thing that one engine, or somebody else, did. Beside it stands the median of the row
that it is to be compared with, its baseline, which was measured in the same run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from trio_supermachine import __version__

#: What was done, its unit, and who did it.
Key = tuple[str, str, str]
HEAD = ("median", "p99", "unit", "baseline", "ratio", "engine")


@attrs.define
class Rows:
    """The rows of one table, in the order of their first values.

    :ivar by: whose values they are, where :meth:`add` is told nothing else.
    :ivar title: a line above the table.
    :ivar notes: lines below it, such as targets.
    """

    by: str = "host"
    title: str = ""
    notes: list[str] = attrs.field(factory=list)
    values: dict[Key, list[float]] = attrs.field(factory=dict)
    _baselines: dict[str, tuple[str, str | None]] = attrs.field(factory=dict)

    def add(self, name: str, value: float, unit: str = "ms", *, by: str | None = None) -> None:
        self.values.setdefault((name, unit, by or self.by), []).append(value)

    @contextmanager
    def timed(self, name: str, *, by: str | None = None) -> Iterator[None]:
        """Add the milliseconds that the block takes."""
        begin = time.perf_counter()
        yield
        self.add(name, (time.perf_counter() - begin) * 1e3, by=by)

    def compare(self, name: str, baseline: str | None = None, *, by: str | None = None) -> None:
        """Show ``baseline`` beside the row ``name``; without it, the same of ``by``."""
        self._baselines[name] = (baseline or name, by)

    def median(self, name: str, *, by: str | None = None) -> float:
        (values,) = (v for key, v in self.values.items() if key[0] == name and by in (None, key[2]))
        return statistics.median(values)

    def baseline(self, key: Key) -> Key | None:
        """The row that stands beside a row."""
        name, by = self._baselines.get(key[0], ("", None))
        for other in self.values:
            if other[:2] == (name, key[1]) and other != key and by in (None, other[2]):
                return other
        return None

    def summary(self) -> list[dict[str, Any]]:
        """Each row by its columns."""
        found: list[dict[str, Any]] = []
        for key, values in self.values.items():
            name, unit, by = key
            row: dict[str, Any] = {
                "name": name,
                "unit": unit,
                "engine": by,
                "count": len(values),
                "best": _best_first(values, unit)[0],
                "median": statistics.median(values),
                "p99": _p99(values, unit),
                "baseline": None,
                "ratio": None,
            }
            if (other := self.baseline(key)) is not None:
                beside = statistics.median(self.values[other])
                row["baseline"] = {"name": other[0], "engine": other[2], "median": beside}
                row["ratio"] = statistics.median(values) / beside if beside else None
            found.append(row)
        return found

    def print(self) -> None:
        rows = self.summary()
        width = max([48, *(len(row["name"]) for row in rows)])
        if self.title:
            print(self.title)
        print(_line(width, "", *HEAD))
        for row in rows:
            beside = "-" if row["baseline"] is None else f"{row['baseline']['median']:.2f}"
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
            median, p99 = f"{row['median']:.2f}", f"{row['p99']:.2f}"
            print(_line(width, row["name"], median, p99, row["unit"], beside, ratio, row["engine"]))
        for note in self.notes:
            print(note)
        print(flush=True)


def _line(
    width: int, name: str, median: str, p99: str, unit: str, beside: str, ratio: str, by: str
) -> str:
    return f"{name:{width}} {median:>9} {p99:>9} {unit:6} {beside:>9} {ratio:>6} {by}"


def _best_first(values: list[float], unit: str) -> list[float]:
    """Sorted: of a rate more is better, of all else less."""
    return sorted(values, reverse=unit.endswith("/s"))


def _p99(values: list[float], unit: str) -> float:
    return _best_first(values, unit)[min(len(values) - 1, int(len(values) * 0.99))]


@attrs.define
class Report:
    """All tables of one run, with what it ran on.

    :ivar load: how many processes wanted a processor in the minute before the run.
    """

    benchmark: str
    smoke: bool
    options: dict[str, object]
    tables: list[Rows] = attrs.field(factory=list)
    load: float = attrs.field(factory=lambda: os.getloadavg()[0])

    def write(self, file: Path) -> None:
        document = {
            "benchmark": self.benchmark,
            "smoke": self.smoke,
            "options": self.options,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "version": __version__,
            "host": _host() | {"load before": self.load, "load after": os.getloadavg()[0]},
            "tables": [
                {"title": rows.title, "notes": rows.notes, "rows": rows.summary()}
                for rows in self.tables
            ],
        }
        file.write_text(json.dumps(document, indent=1) + "\n")


def _host() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "processors": os.cpu_count(),
        "processor": models[0] if models else platform.machine(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
