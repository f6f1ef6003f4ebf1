"""The reader of layers finds circles and arrows that run up, and reads the documented order."""

from __future__ import annotations

import pytest

from ..support.layers import (
    arrows_up,
    documented_rooms,
    find_circles,
    room_of,
    rooms_of,
    told_circle,
)

_PAGE = """\
Some page
=========

.. list-table:: Other rooms
   :header-rows: 1

   * - Room
     - What
   * - ``attic/``
     - nothing

.. list-table:: Rooms of a house
   :header-rows: 1
   :widths: auto

   * - Room
     - What lives there
   * - ``roof``
     - ``not a room``
   * - ``bed/``,
       ``bath/``
     - sleep
   * - ``cellar/``
     - what ``bed/`` stands on

Text after the table with ``words``.
"""


def test_floors_are_read_from_a_table_by_its_title() -> None:
    assert documented_rooms(_PAGE, "Rooms of a house") == [
        ("roof",),
        ("bed/", "bath/"),
        ("cellar/",),
    ]
    assert documented_rooms(_PAGE, "Other rooms") == [("attic/",)]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("", "no list-table 'T'"),
        (".. list-table:: T\n\n   * - words\n     - ``x``\n", "names no room: 'words'"),
        (".. list-table:: T\n\n   * - ``x``\n     - a\n   * - ``x``\n     - b\n", "twice: x"),
    ],
)
def test_a_table_that_says_too_little_is_refused(page: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        documented_rooms(page, "T")


_FLOORS = [("roof",), ("bed/", "bath/"), ("cellar/", "cellar/wine/")]


def test_a_file_is_in_the_closest_room_that_has_it() -> None:
    assert room_of("roof.py", _FLOORS) == "roof"
    assert room_of("cellar/coal.c", _FLOORS) == "cellar/"
    assert room_of("cellar/wine/red.c", _FLOORS) == "cellar/wine/"
    with pytest.raises(ValueError, match=r"garden\.py is in no room"):
        room_of("garden.py", _FLOORS)


def test_arrows_down_and_within_a_room_are_no_arrows_up() -> None:
    edges = {
        ("roof.py", "bed/frame.py"): {"a"},
        ("roof.py", "cellar/coal.c"): {"a"},
        ("bath/tub.py", "bath/tap.py"): {"a"},
    }
    assert arrows_up(edges, _FLOORS) == []


def test_arrows_up_and_between_rooms_of_one_floor_are_found() -> None:
    edges = {
        ("cellar/coal.c", "bed/frame.py"): {"a"},
        ("bath/tub.py", "bed/frame.py"): {"a"},
        ("roof.py", "bed/frame.py"): {"a"},
    }
    assert arrows_up(edges, _FLOORS) == [
        ("cellar/coal.c", "bed/frame.py"),
        ("bath/tub.py", "bed/frame.py"),
    ]


def test_each_knot_is_found_once_by_its_shortest_circle() -> None:
    edges = {
        *(("a", "b"), ("b", "c"), ("c", "a"), ("b", "a"), ("a", "a")),
        *(("c", "d"), ("d", "e"), ("d", "d")),
        *(("x", "y"), ("y", "z"), ("z", "x")),
    }
    assert find_circles(edges) == [["a", "b"], ["x", "y", "z"]]
    assert find_circles({("a", "b"), ("a", "c"), ("b", "c")}) == []


def test_a_circle_is_told_with_the_names_taken() -> None:
    edges = {("a.c", "b.c"): {"two", "one"}, ("b.c", "a.c"): {"three"}}
    (circle,) = find_circles(edges)
    assert told_circle(edges, circle) == ("a.c takes from b.c: one, two\nb.c takes from a.c: three")


def test_rooms_can_be_in_a_circle_where_files_are_not() -> None:
    edges = {
        ("bed/frame.py", "cellar/coal.c"): {"a"},
        ("cellar/wood.c", "bed/pillow.py"): {"b"},
    }
    assert find_circles(edges) == []
    assert rooms_of(edges, _FLOORS) == {("bed/", "cellar/"): {"a"}, ("cellar/", "bed/"): {"b"}}
    assert find_circles(rooms_of(edges, _FLOORS)) == [["bed/", "cellar/"]]
