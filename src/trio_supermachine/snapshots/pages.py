"""Runs of pages: sorted pairs of the first page's number and the count of pages."""

from __future__ import annotations

from collections.abc import Iterable

PAGE = 4096  # bytes

Run = tuple[int, int]


def union(*many: Iterable[Run]) -> list[Run]:
    """Give the pages that any of these has, as runs with a gap between each and the next."""
    merged: list[Run] = []
    for start, count in sorted(run for runs in many for run in runs):
        if merged and start <= merged[-1][0] + merged[-1][1]:
            first = merged[-1][0]
            merged[-1] = (first, max(merged[-1][0] + merged[-1][1], start + count) - first)
        elif count:
            merged.append((start, count))
    return merged


def intersection(left: Iterable[Run], right: Iterable[Run]) -> list[Run]:
    """Give the pages that both have; both are as :func:`union` gives them."""
    common = []
    others = iter(right)
    other = next(others, None)
    for start, count in left:
        end = start + count
        while other is not None and other[0] < end:
            first, last = max(start, other[0]), min(end, other[0] + other[1])
            if first < last:
                common.append((first, last - first))
            if other[0] + other[1] > end:
                break
            other = next(others, None)
    return common


def total(runs: Iterable[Run]) -> int:
    """Count the pages."""
    return sum(count for _, count in runs)
