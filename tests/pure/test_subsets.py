"""The choice of tests in scripts/test-debian13 still names tests."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_word_of_the_choice_is_in_a_tests_name() -> None:
    script = (ROOT / "scripts/test-debian13").read_text()
    choice = script.partition("<<'EOF'\n")[2].partition("\nEOF\n")[0]
    words = choice.replace("\n", " ").split(" or ")
    assert len(words) > 10
    names = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(node.name)
    tests = " ".join(name for name in names if name.startswith("test_"))
    assert [word for word in words if word not in tests] == []
