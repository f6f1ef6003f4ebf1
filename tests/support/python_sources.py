"""The imports of Python sources, read without running them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from .layers import Arrow


class Sources:
    """The modules of a package.

    :param package: its directory.
    """

    def __init__(self, package: Path) -> None:
        self._package = package
        self._files = {self._module(file): file for file in package.rglob("*.py")}

    def names(self) -> list[str]:
        """Name the files, by their paths below the package."""
        return [self._name(module) for module in self._files]

    def imports(self) -> dict[Arrow, set[str]]:
        """Give each arrow between files, with the names that are taken.

        Imports count wherever they stand: in functions, and under ``if TYPE_CHECKING:``.
        """
        edges: dict[Arrow, set[str]] = {}
        for name in self.names():
            edges.update(self.imports_of(name))
        return edges

    def imports_of(self, name: str, more: str = "") -> dict[Arrow, set[str]]:
        """Give the arrows from one file, as if it ended with ``more``."""
        file = self._package / name
        inside = self._module(file).split(".")
        if file.name != "__init__.py":
            inside.pop()
        edges: dict[Arrow, set[str]] = {}
        for node in ast.walk(ast.parse(f"{file.read_text()}\n{more}\n")):
            for giver, taken in self._taken(node, inside):
                edges.setdefault((name, self._name(giver)), set()).add(taken)
        return edges

    def _taken(self, node: ast.AST, inside: list[str]) -> Iterator[tuple[str, str]]:
        """Give pairs of a module, and the name that an import takes from it."""
        if isinstance(node, ast.Import):
            yield from ((a.name, a.name) for a in node.names if a.name in self._files)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                module = f"{origin}.{alias.name}"
                giver = module if module in self._files else origin
                if giver in self._files:
                    yield giver, alias.name

    def _module(self, file: Path) -> str:
        parts = [self._package.name, *file.relative_to(self._package).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _name(self, module: str) -> str:
        return self._files[module].relative_to(self._package).as_posix()
