"""What the documentation shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.rst"))]
#: The pages whose Python is whole programs.
PROGRAMS = [
    ROOT / "README.md",
    ROOT / "docs/tutorial/index.rst",
    ROOT / "docs/explanation/snapshots.rst",
]
#: The pages whose Python is parts of programs, or needs an image of the reader's own.
FRAGMENTS = [*sorted((ROOT / "docs/howto").glob("*.rst")), ROOT / "docs/explanation/baking.rst"]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page."""
    text = page.read_text()
    if page.suffix == ".md":
        return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = re.findall(rf"^\.\. code-block:: {language}\n\n((?:   .*\n|\n)+)", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def cases(pages: list[Path], language: str) -> list[object]:
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in pages
        for number, block in enumerate(blocks(page, language), 1)
    ]


#: The page about a device: the device, a program with it, a part of another one, and its tests.
DEVICE = blocks(ROOT / "docs/howto/devices.rst", "python")


def run_program(program: str, directory: Path) -> None:
    file = directory / "program.py"
    file.write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(file)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=directory,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.vm
@pytest.mark.parametrize("program", cases(PROGRAMS, "python"))
def test_programs_run(program: str, tmp_path: Path) -> None:
    run_program(program, tmp_path)


@pytest.mark.kvm
def test_the_program_with_a_device_runs(tmp_path: Path) -> None:
    (tmp_path / "dice.py").write_text(DEVICE[0])
    run_program(DEVICE[1], tmp_path)


def test_the_part_of_a_device_compiles() -> None:
    compile(DEVICE[2], "fragment", "exec")


async def test_the_tests_of_the_device_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    device = ModuleType("dice")
    exec(DEVICE[0], vars(device))
    monkeypatch.setitem(sys.modules, "dice", device)
    names = {"__name__": "tests.test_dice", "__package__": __package__}
    exec(DEVICE[3], names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        assert callable(test)
        await test()


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_there_are_programs_to_run(page: Path) -> None:
    assert blocks(page, "python")


@pytest.mark.parametrize("fragment", cases(FRAGMENTS, "python"))
def test_fragments_compile(fragment: str) -> None:
    compile("async def _() -> None:\n" + textwrap.indent(fragment, "    "), "fragment", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_references_to_public_names_lead_there(page: Path) -> None:
    import trio_supermachine

    text = page.read_text()
    references = re.findall(r":(?:class|exc|meth|func|attr|data):`~?([\w.]+)`", text)
    own = [name for name in references if name.split(".")[0] in trio_supermachine.__all__]
    for name in own:
        attrgetter(name)(trio_supermachine)
    assert not own or ".. currentmodule:: trio_supermachine" in text


@pytest.mark.parametrize("script", cases(PAGES, "sh"))
def test_shell_blocks_parse(script: str) -> None:
    subprocess.run(["bash", "-n", "-c", script], check=True, capture_output=True)


def test_every_trace_category_is_documented() -> None:
    from trio_supermachine._util.trace import CATEGORIES

    page = (ROOT / "docs/reference/trace.rst").read_text()
    for category, shows in CATEGORIES.items():
        assert re.search(rf"^{category} +{re.escape(shows)}$", page, re.MULTILINE)


def test_every_public_name_is_in_the_reference() -> None:
    import trio_supermachine

    pages = [page for page in (ROOT / "docs/reference").glob("*.rst") if page.stem != "devices"]
    documented = [
        name
        for page in pages
        for name in re.findall(r"^\.\. auto\w+:: (\w+)", page.read_text(), re.MULTILINE)
    ]
    assert sorted(documented) == sorted(set(trio_supermachine.__all__) - {"__version__"})
