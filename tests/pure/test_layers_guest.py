"""The guest's C sources take from each other downwards only, and in no circle.

The order of the rooms is that of docs/architecture.rst. What is checked here is sure to fail where
it should: a copy of the sources with one arrow more is found, and its names are told.
"""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

from trio_supermachine import guest

from ..support.c_sources import read_edges
from ..support.layers import (
    Arrow,
    Floors,
    arrows_up,
    documented_rooms,
    find_circles,
    room_of,
    told,
    told_circle,
)

GUEST = Path(guest.__file__).parent
ARCHITECTURE = Path(__file__).parents[2] / "docs" / "explanation" / "architecture.rst"
GENERATED = {"bpf_hooks.h": "bpf/hooks.c"}


def files_of(directory: Path) -> list[str]:
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*.[ch]"))
    return [name for name in names if not name.startswith("bin/")]


def edges_of(directory: Path) -> dict[Arrow, set[str]]:
    return read_edges(directory, files_of(directory), GENERATED)


@pytest.fixture(scope="module")
def floors() -> Floors:
    return documented_rooms(ARCHITECTURE.read_text(), "Rooms of the guest")


def test_no_file_takes_from_an_upper_room(floors: Floors) -> None:
    edges = edges_of(GUEST)
    assert not (up := arrows_up(edges, floors)), "\n" + told(edges, up)


def test_no_files_take_from_each_other_in_a_circle() -> None:
    edges = edges_of(GUEST)
    assert not (circles := find_circles(edges)), "\n\n".join(
        told_circle(edges, circle) for circle in circles
    )


def test_every_room_of_the_documentation_is_there_and_no_other(floors: Floors) -> None:
    rooms = {room_of(name, floors) for name in files_of(GUEST)}
    assert rooms == {room for floor in floors for room in floor}


def test_the_sources_that_are_read_are_those_that_are_compiled() -> None:
    build = runpy.run_path(str(GUEST / "build.py"))
    compiled = {*build["sources"]("init"), *build["sources"]("launcher"), build["_HOOKS"]}
    assert {name for name in files_of(GUEST) if name.endswith(".c")} == compiled
    assert {build["_HOOKS_HEADER"]: build["_HOOKS"]} == GENERATED


def test_includes_calls_and_variables_are_read() -> None:
    edges = edges_of(GUEST)
    assert {"programs/freezer.h", "freezer_allows"} <= edges[
        "programs/exec.c", "programs/freezer.c"
    ]
    assert "image" in edges["programs/workload.c", "core/image.c"]  # a variable
    assert "session_accept" in edges["life/lifeline.c", "core/session.c"]  # handed on, not called
    assert edges["network/hooks.c", "bpf/hooks.c"] == {"bpf_hooks.h"}


@pytest.mark.parametrize(
    ("lower", "more", "upper", "names"),
    [
        ("core/util.c", '#include "life/power.h"', "life/power.c", {"life/power.h"}),
        ("core/util.h", '#include "core/session.h"\n#include "agent.h"', "agent.c", {"agent.h"}),
        ("core/loop.c", '  #  include  "life/power.h" // why', "life/power.c", {"life/power.h"}),
        (
            "carriers/serial.c",
            "_Noreturn void power_off(void);\nstatic void leave(void) { power_off(); }",
            "life/power.c",
            {"power_off"},
        ),
        (
            "system/children.c",
            "extern const struct action exec_action;\nstatic const void *above = &exec_action;",
            "programs/exec.c",
            {"exec_action"},
        ),
        (
            "programs/streams.c",
            "void *after(void) { return network_open; }",
            "network/network.c",
            {"network_open"},
        ),
        (
            "bpf/flow.h",
            '#define FIRST() say("first")',
            "core/util.c",
            {"say"},
        ),
    ],
)
def test_an_arrow_up_is_found_and_told(
    tmp_path: Path, floors: Floors, lower: str, more: str, upper: str, names: set[str]
) -> None:
    add_to(tmp_path, lower, more)
    edges = edges_of(tmp_path / "guest")
    lower = lower if lower in {taker for taker, _ in edges} else lower.replace(".h", ".c")
    assert (lower, upper) in arrows_up(edges, floors)
    assert edges[lower, upper] == names
    line = f"{lower} takes from {upper}: {', '.join(sorted(names))}"
    assert line in told(edges, arrows_up(edges, floors)).splitlines()


@pytest.mark.parametrize(
    ("file", "more", "other"),
    [
        ("core/wire.c", '#include "core/session.h"', "core/session.c"),
        ("network/relay.c", "static void more(void) { egress_dialled(); }", "network/egress.c"),
        ("carriers/lines.c", "static int now(void) { return voice; }", "carriers/sending.c"),
    ],
)
def test_a_circle_within_a_room_is_found_and_told(
    tmp_path: Path, floors: Floors, file: str, more: str, other: str
) -> None:
    add_to(tmp_path, file, more)
    edges = edges_of(tmp_path / "guest")
    assert arrows_up(edges, floors) == []
    (circle,) = find_circles(edges)
    assert set(circle) == {file, other}
    assert f"{file} takes from {other}: " in told_circle(edges, circle)


@pytest.mark.parametrize(
    "more",
    [
        '/* power_off() is for others; #include "life/power.h" too. */',
        'static const char *text = "power_off()";',
        "struct power_off { int left; };",
        "static int call(struct power_off *it) { return it->shut_down + (*it).shut_down; }",
        "static void network_open(void) {}\nstatic void *own(void) { return network_open; }",
    ],
)
def test_what_only_looks_like_an_arrow_is_none(tmp_path: Path, more: str) -> None:
    before = edges_of(GUEST)
    add_to(tmp_path, "core/util.c", more)
    assert edges_of(tmp_path / "guest") == before


def test_a_file_outside_of_the_rooms_is_refused(tmp_path: Path, floors: Floors) -> None:
    add_to(tmp_path, "core/util.c", "")
    (tmp_path / "guest" / "late.c").write_text('#include "core/util.h"\n')
    with pytest.raises(ValueError, match=r"late\.c is in no room"):
        arrows_up(edges_of(tmp_path / "guest"), floors)


def add_to(tmp_path: Path, file: str, more: str) -> None:
    """Copy the sources, with this at the end of one of them."""
    ignored = shutil.ignore_patterns("bin", "__pycache__")
    shutil.copytree(GUEST, tmp_path / "guest", ignore=ignored)
    with (tmp_path / "guest" / file).open("a") as end:
        end.write(f"\n{more}\n")
