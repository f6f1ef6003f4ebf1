"""Layers of sources: rooms as documented, and arrows between files as they are.

*Edges* map an arrow, the file that takes and the file that gives, to the names that are taken.
A file's name is its path with ``/``, below whatever directory the rooms are in.

*Floors* are rooms from the uppermost down, as the documentation lists them. A room is a directory
(``core/``) or a file (``main.c``; ``errors`` for ``errors.py``). A file belongs to the longest of
the names that lead to it. Rooms of one floor take nothing from each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

Arrow = tuple[str, str]
Edges = Mapping[Arrow, Iterable[str]]
Floors = Sequence[Sequence[str]]


def documented_rooms(rst_text: str, table_title: str) -> list[tuple[str, ...]]:
    """Floors that the ``list-table`` of this title has, from the uppermost down.

    Each row is a floor; the literals in its first cell are the rooms there.

    :raises ValueError: there is no such table, or a row that names no room, or a room named twice.
    """
    table = re.search(
        rf"^\.\. list-table:: {re.escape(table_title)}\n((?:[ \t]+.*\n|\n)*)",
        rst_text + "\n",
        re.MULTILINE,
    )
    if table is None:
        raise ValueError(f"no list-table {table_title!r}")
    headers = re.search(r":header-rows: (\d+)", table[1])
    rows = re.split(r"^\s*\* - ", table[1], flags=re.MULTILINE)[1:]
    floors = []
    for row in rows[int(headers[1]) if headers else 0 :]:
        cell = re.split(r"^\s+- ", row, flags=re.MULTILINE)[0]
        floors.append(tuple(re.findall(r"``([^`]+)``", cell)))
        if not floors[-1]:
            raise ValueError(f"{table_title!r} has a row that names no room: {cell.strip()!r}")
    rooms = [room for floor in floors for room in floor]
    if twice := {room for room in rooms if rooms.count(room) > 1}:
        raise ValueError(f"{table_title!r} names twice: {', '.join(sorted(twice))}")
    return floors


def room_of(file: str, floors: Floors) -> str:
    """The room that this file is in.

    :raises ValueError: no room has it.
    """
    stem = str(PurePosixPath(file).with_suffix(""))
    rooms = [
        room
        for floor in floors
        for room in floor
        if (file.startswith(room) if room.endswith("/") else room in (file, stem))
    ]
    if not rooms:
        raise ValueError(f"{file} is in no room of the documentation")
    return max(rooms, key=len)


def arrows_up(edges: Edges, order: Floors) -> list[Arrow]:
    """Arrows from a lower to an upper room, or between rooms of one floor."""
    height = {room: -index for index, floor in enumerate(order) for room in floor}
    found = []
    for arrow in edges:
        taker, giver = (room_of(file, order) for file in arrow)
        if taker != giver and height[giver] >= height[taker]:
            found.append(arrow)
    return found


def find_circles(edges: Iterable[Arrow]) -> list[list[str]]:
    """A shortest circle of each knot of files that all reach each other.

    Each file of a circle takes from the next, and the last from the first. A file may take from
    itself: that is no circle.
    """
    gives: dict[str, list[str]] = {}
    for taker, giver in sorted(edges):
        gives.setdefault(taker, [])
        gives.setdefault(giver, [])
        if taker != giver:
            gives[taker].append(giver)
    reached = {file: _reached(file, gives) for file in gives}
    circles: list[list[str]] = []
    knotted: set[str] = set()
    for file in gives:
        if file in knotted or file not in reached[file]:
            continue
        knot = {other for other in reached[file] if file in reached[other]}
        knotted |= knot
        ways = [_way_back(member, gives) for member in sorted(knot)]
        circles.append(min(ways, key=len))
    return circles


def rooms_of(edges: Edges, floors: Floors) -> dict[Arrow, set[str]]:
    """The same arrows between rooms, without those that stay in one."""
    between: dict[Arrow, set[str]] = {}
    for (taker, giver), names in edges.items():
        rooms = room_of(taker, floors), room_of(giver, floors)
        if rooms[0] != rooms[1]:
            between.setdefault(rooms, set()).update(names)
    return between


def told(edges: Edges, arrows: Iterable[Arrow]) -> str:
    """Text for people: which file takes what from which."""
    return "\n".join(
        f"{taker} takes from {giver}: {', '.join(sorted(edges[taker, giver]))}"
        for taker, giver in arrows
    )


def told_circle(edges: Edges, circle: Sequence[str]) -> str:
    """Text for people: each arrow of a circle."""
    return told(edges, zip(circle, [*circle[1:], circle[0]], strict=True))


def _reached(file: str, gives: Mapping[str, Sequence[str]]) -> set[str]:
    found: set[str] = set()
    new = [file]
    while new:
        fresh = [other for other in gives[new.pop()] if other not in found]
        found.update(fresh)
        new += fresh
    return found


def _way_back(file: str, gives: Mapping[str, Sequence[str]]) -> list[str]:
    """The shortest circle through a file that is on one."""
    ways = [[file]]
    seen = {file}
    for way in ways:
        for other in gives[way[-1]]:
            if other == file:
                return way
            if other not in seen:
                seen.add(other)
                ways.append([*way, other])
    raise ValueError(f"{file} is on no circle")
