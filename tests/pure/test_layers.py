"""Python modules take from each other downwards only, and in no circle.

The order of the rooms is that of docs/explanation/architecture.rst.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import trio_supermachine

from ..support.layers import (
    Edges,
    Floors,
    arrows_up,
    documented_rooms,
    find_circles,
    room_of,
    rooms_of,
    told,
    told_circle,
)
from ..support.python_sources import Sources

SOURCES = Sources(Path(trio_supermachine.__file__).parent)
ARCHITECTURE = Path(__file__).parents[2] / "docs" / "explanation" / "architecture.rst"


@pytest.fixture(scope="module")
def floors() -> Floors:
    return documented_rooms(ARCHITECTURE.read_text(), "Rooms of the package")


@pytest.fixture(scope="module")
def edges() -> Edges:
    return SOURCES.imports()


def test_no_module_imports_from_an_upper_room(edges: Edges, floors: Floors) -> None:
    assert not (up := arrows_up(edges, floors)), "\n" + told(edges, up)


def test_no_modules_import_each_other_in_a_circle(edges: Edges) -> None:
    assert not (circles := find_circles(edges)), "\n\n".join(
        told_circle(edges, circle) for circle in circles
    )


def test_no_rooms_import_each_other_in_a_circle(edges: Edges, floors: Floors) -> None:
    assert not find_circles(rooms_of(edges, floors))


def test_every_room_of_the_documentation_is_there_and_no_other(floors: Floors) -> None:
    rooms = {room for floor in floors for room in floor}
    assert {room_of(name, floors) for name in SOURCES.names()} == rooms


@pytest.mark.parametrize(
    ("lower", "more", "upper", "names"),
    [
        ("oci/tar.py", "from ..vm.plan import Plan", "vm/plan.py", {"Plan"}),
        ("errors.py", "from .api import Image, Vm", "api.py", {"Image", "Vm"}),
        ("hv/base.py", "import trio_supermachine.cli.app", "cli/app.py", None),
        ("net/relay.py", "from .. import api", "api.py", {"api"}),
        (
            "images/spec.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..api import Vm",
            "api.py",
            {"Vm"},
        ),
        ("_util/trace.py", "def late():\n    from ..host.files import home", "host/files.py", None),
        # Rooms of one floor take nothing from each other.
        ("net/names.py", "from ..programs.request import Command", "programs/request.py", None),
    ],
)
def test_an_import_from_an_upper_room_is_found(
    edges: Edges, floors: Floors, lower: str, more: str, upper: str, names: set[str] | None
) -> None:
    changed = {**edges, **SOURCES.imports_of(lower, more)}
    assert arrows_up(changed, floors) == [(lower, upper)]
    assert f"{lower} takes from {upper}: " in told(changed, [(lower, upper)])
    if names is not None:
        assert changed[lower, upper] == names


def test_a_circle_in_one_room_is_found(edges: Edges) -> None:
    more = SOURCES.imports_of("net/policy.py", "from .egress import EgressServer")
    (circle,) = find_circles({**edges, **more})
    assert {"net/policy.py", "net/egress.py"} <= {*circle}
