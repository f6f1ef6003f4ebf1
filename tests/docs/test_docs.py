"""What the documentation shows is what happens."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
from collections import Counter
from operator import attrgetter
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import attrs
import pytest
import trio

import trio_supermachine
from trio_supermachine.hv.base import Console
from trio_supermachine.snapshots import Snapshot
from trio_supermachine.vm.limits import MemoryAdmission, SpawnConcurrency

from ..support.doc_blocks import Block, blocks_of
from ..support.doc_images import Surroundings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.rst"))]
BLOCKS = {page: blocks_of(page) for page in PAGES}
#: The page about a device has tests of its own below.
DEVICE = DOCS / "howto/devices.rst"
#: Why blocks are not run, and how many there are.
NOT_RUN = {
    "asks for a password": 1,
    "installs packages": 5,
    "needs Docker": 1,
    "takes minutes": 8,
}

#: What the reader of a part of a program has imported.
_IMPORTS = "import subprocess\nimport trio\nfrom trio_supermachine import *\n"


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runs(block: Block) -> bool:
    return block.kind == "file" or (block.kind != "not run" and block.language in ("python", "sh"))


def compiled(block: Block) -> CodeType:
    """The code of a block, whose lines are those of its page; it may have ``await`` anywhere."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT if block.kind in ("run in", "not run") else 0
    code = compile(block.whole, str(block.page), "exec", flags=flags, dont_inherit=True)
    assert isinstance(code, CodeType)
    return code


def run_python(block: Block) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    code = compiled(block)
    if block.kind == "run in":
        exec(_IMPORTS, names)
    result = eval(code, names)
    if inspect.iscoroutine(result):

        async def main() -> None:
            await result

        trio.run(main)


def run_shell(block: Block, directory: Path) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.whole],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=directory,
    )
    assert done.returncode == 0, f"{block}: {done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.mark.vm
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p != DEVICE and any(map(runs, BLOCKS[p]))], ids=page_id
)
def test_all_code_of_the_page_runs(
    page: Path, surroundings: Surroundings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surroundings.enter(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    for block in filter(runs, BLOCKS[page]):
        if block.kind == "file":
            (tmp_path / block.value).write_text(block.text)
            monkeypatch.delitem(sys.modules, Path(block.value).stem, raising=False)
        elif block.language == "python":
            run_python(block)
        else:
            run_shell(block, tmp_path)


def _examples() -> dict[str, str]:
    """The examples in the docstrings of public names, by the name."""
    found: dict[str, str] = {}
    for name in trio_supermachine.__all__:
        value = getattr(trio_supermachine, name)
        members = _public_members(value) if inspect.isclass(value) else ()
        for path in [name, *(f"{name}.{member}" for member in members)]:
            # A field of a frozen class has no docstring of its own.
            documented = getattr(value, path.partition(".")[2] or "__doc__", None)
            text = inspect.getdoc(value if path == name else documented) or ""
            if example := re.search(r"^Example::\n\n((?: {4}.*\n|\n)+)", text + "\n", re.M):
                found.setdefault(textwrap.dedent(example[1]), path)  # a call may have two names
    return {path: example for example, path in found.items()}


@pytest.mark.vm
async def test_the_examples_of_docstrings_run(
    surroundings: Surroundings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surroundings.enter(tmp_path, monkeypatch)
    examples = _examples()
    assert len(examples) >= 8
    image = await trio_supermachine.Image.from_oci("oci:webapp")  # serves port 8000
    async with trio_supermachine.Vm.start(image) as vm:
        for name, example in examples.items():
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            code = compile(example, f"<example of {name}>", "exec", flags, dont_inherit=True)
            names: dict[str, Any] = {"image": image, "vm": vm}
            exec(_IMPORTS, names)
            result = eval(code, names)
            if inspect.iscoroutine(result):
                await result


def test_what_is_not_run_has_one_of_these_reasons() -> None:
    blocks = [block for blocks in BLOCKS.values() for block in blocks if block.kind == "not run"]
    assert Counter(block.value for block in blocks) == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_all_code_of_the_page_is_well_formed(page: Path) -> None:
    for block in BLOCKS[page]:
        if block.language == "python":
            compiled(block)
        elif block.language == "sh":
            subprocess.run(["bash", "-n", "-c", block.whole], check=True, capture_output=True)
        elif block.language == "toml":
            tomllib.loads(block.text)
        else:
            assert block.kind == "file", f"{block}: nobody reads {block.language}"


@pytest.mark.kvm
def test_the_program_with_a_device_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, program = BLOCKS[DEVICE][:2]
    (tmp_path / "dice.py").write_text(device.text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dice", raising=False)
    run_python(program)


async def test_the_tests_of_the_device_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    device, tests = BLOCKS[DEVICE][0], BLOCKS[DEVICE][3]
    module = ModuleType("dice")
    exec(device.text, vars(module))
    monkeypatch.setitem(sys.modules, "dice", module)
    names = {"__name__": "tests.test_dice", "__package__": __package__}
    exec(tests.text, names)
    found = [value for name, value in names.items() if name.startswith("test_")]
    assert len(found) == 3
    for test in found:
        assert callable(test)
        await test()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_references_to_public_names_lead_there(page: Path) -> None:
    text = page.read_text()
    references = re.findall(r":(?:class|exc|meth|func|attr|data):`~?([\w.]+)`", text)
    own = [name for name in references if name.split(".")[0] in trio_supermachine.__all__]
    for name in own:
        attrgetter(name)(trio_supermachine)
    assert not own or ".. currentmodule:: trio_supermachine" in text


def test_every_trace_category_is_documented() -> None:
    from trio_supermachine._util.trace import CATEGORIES

    page = (DOCS / "reference/trace.rst").read_text()
    for category, shows in CATEGORIES.items():
        assert re.search(rf"^{category} +{re.escape(shows)}$", page, re.MULTILINE)


def test_every_environment_variable_is_documented() -> None:
    variable = re.compile(r"\bTRIO_SUPERMACHINE_[A-Z_]*[A-Z]\b")
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    sources += [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    used = {name for path in sources for name in variable.findall(path.read_text())}
    page = (DOCS / "reference/environment.rst").read_text()
    assert set(variable.findall(page)) == used


def test_programs_that_run_by_name_are_there() -> None:
    named = re.findall(r"``python -m (tests[\w.]+)", (DOCS / "contributing.rst").read_text())
    assert named
    for name in named:
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = [page for page in (DOCS / "reference").glob("*.rst") if page.stem != "devices"]
    documented = [
        name
        for page in pages
        for name in re.findall(r"^\.\. auto\w+:: (\w+)(?![\w.])", page.read_text(), re.MULTILINE)
    ]
    assert sorted(documented) == sorted(set(trio_supermachine.__all__) - {"__version__"})


def _public_members(cls: type) -> set[str]:
    """What a user finds on a class, but for what it shares with another public one."""
    public = [getattr(trio_supermachine, name) for name in trio_supermachine.__all__]
    shared = {b for base in cls.__mro__[1:] if base in public for b in base.__mro__}
    found: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("trio_supermachine") or base in shared:
            continue
        found |= vars(base).keys()
        if attrs.has(base):
            found |= {field.name for field in attrs.fields(base)}
        elif "__init__" in vars(base):
            source = inspect.getsource(vars(base)["__init__"])
            found |= set(re.findall(r"^ +self\.(\w+)(?::.*?)? = ", source, re.MULTILINE))
    return {name for name in found if not name.startswith("_")}


#: Members of objects that users get and whose classes have no public name.
HANDED_OUT = {
    "Image.snapshot": {"directory", "identity", "depth"},
    "Vm.console": _public_members(Console),
    "memory_admission": _public_members(MemoryAdmission),
    "spawn_concurrency": _public_members(SpawnConcurrency),
}


def test_the_reference_tells_the_truth_of_what_has_no_public_class() -> None:
    assert HANDED_OUT["Image.snapshot"] < {field.name for field in attrs.fields(Snapshot)}
    page = (DOCS / "reference/vm.rst").read_text()
    for name in HANDED_OUT["Vm.console"]:
        signature = str(inspect.signature(getattr(Console, name), eval_str=True))
        assert f".. method:: Vm.console.{name}{signature}\n".replace("self, ", "") in page


def test_the_reference_has_every_public_member_and_no_other(tmp_path: Path) -> None:
    excluded = {
        f"{cls}.{member.strip()}"
        for page in (DOCS / "reference").glob("*.rst")
        for cls, members in re.findall(
            r"^\.\. autoclass:: (\w+).*\n(?: .*\n)*? +:exclude-members: (.*)\n",
            page.read_text(),
            re.MULTILINE,
        )
        for member in members.split(",")
    }
    script = """
import sys
from sphinx.application import Sphinx
docs, out = sys.argv[1:]
others = ["_build", "tutorial", "howto", "explanation"]
app = Sphinx(docs, docs, out, out, "dummy", {"exclude_patterns": others}, status=None, warning=None)
app.build()
for name, entry in app.env.domaindata["py"]["objects"].items():
    if not entry.aliased:
        print(name)
"""
    command = [sys.executable, "-c", script, str(DOCS), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    prefix = "trio_supermachine."
    listed = {name.removeprefix(prefix) for name in done.stdout.split() if name.startswith(prefix)}
    documented = {name for name in listed if not name.startswith("devices.")}
    expected = set(trio_supermachine.__all__) - {"__version__"}
    for name in sorted(expected):
        value = getattr(trio_supermachine, name)
        if inspect.isclass(value):
            expected |= {f"{name}.{member}" for member in _public_members(value)}
    for place, members in HANDED_OUT.items():
        expected |= {f"{place}.{member}" for member in members}
    assert excluded <= expected, "the reference leaves out what does not exist"
    assert sorted(expected - excluded - documented) == [], "the reference lacks these"
    assert sorted(documented - (expected - excluded)) == [], "nothing public has these names"
