"""Document values as their users see them.

- Signatures of attrs classes show what a default is, not where attrs keeps it
  (``attr_dict['vcpus'].default``).
- Fields of attrs classes and members of enumerations are listed, also without a comment.
- ``:ivar name: text`` in the docstring of a class becomes the text of that field, or an entry of
  its own for an attribute that Sphinx does not find. Either can be linked to.
- A method that gives an async context manager is shown as an ``async with`` block.
- A default that is a number with a name is shown as the number.
"""

from __future__ import annotations

import inspect
import re
import sys
from contextlib import asynccontextmanager
from enum import Enum
from operator import attrgetter
from typing import Any

import attrs
from sphinx.addnodes import desc_signature
from sphinx.application import Sphinx
from sphinxcontrib_trio import ExtendedPyMethod

_IVAR = re.compile(r":ivar (?P<name>\w+): *(?P<text>.*)")


class _Shown:
    """A default that reads as ``text``."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _default(field: attrs.Attribute[Any]) -> object:
    if isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
        return _Shown(repr(field.default.factory()))
    return field.default


def _show_defaults(app: Sphinx, function: Any, bound: bool) -> None:
    owner, _, name = getattr(function, "__qualname__", "").rpartition(".")
    if name != "__init__" or "<" in owner:
        return
    cls = attrgetter(owner)(sys.modules[function.__module__])
    if not attrs.has(cls):
        return
    fields = {field.alias: field for field in attrs.fields(cls)}
    signature = inspect.signature(function)
    function.__signature__ = signature.replace(
        parameters=[
            parameter.replace(default=_default(fields[parameter.name]))
            if parameter.default is not inspect.Parameter.empty
            else parameter
            for parameter in signature.parameters.values()
        ]
    )


def _keep_fields(
    app: Sphinx, what: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    # A field of a frozen class is a slot. Sphinx lists one that has a comment, and stands a
    # sentinel in for it, whose place differs between versions; an inherited one is itself.
    is_slot = repr(member) in ("SLOTS_ATTR", "SLOTSATTR") or inspect.ismemberdescriptor(member)
    if (is_slot or isinstance(member, Enum)) and not name.startswith("_"):
        return False
    return None


def _described(docstring: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Take ``:ivar name: text`` out of a docstring: the texts by name, and the other lines."""
    texts: dict[str, list[str]] = {}
    others = []
    current: list[str] | None = None
    for line in docstring:
        if match := _IVAR.match(line):
            text = match["text"]
            current = texts[match["name"]] = [text[:1].upper() + text[1:]]
        elif current is not None and line.startswith(" "):
            current.append(line.strip())
        else:
            current = None
            others.append(line)
    return texts, others


def _is_listed(cls: type, name: str) -> bool:
    """Whether autodoc finds the attribute by itself."""
    return any(name in getattr(each, "__slots__", ()) for each in cls.__mro__)


def _place_texts(
    app: Sphinx, what: str, name: str, documented: Any, options: object, lines: list[str]
) -> None:
    if what in ("class", "exception"):
        texts, lines[:] = _described(lines)
        for attribute, text in texts.items():
            if not _is_listed(documented, attribute):
                lines += ["", f".. attribute:: {attribute}", "", *(f"   {line}" for line in text)]
    elif what == "attribute" and not any(lines):
        owner, _, attribute = name.rpartition(".")
        cls = _find_class(owner)
        for base in () if cls is None else cls.__mro__:
            texts, _ = _described(inspect.cleandoc(base.__doc__ or "").splitlines())
            if attribute in texts:
                lines[:] = texts[attribute]
                return


def _find_class(name: str) -> type | None:
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return found if inspect.isclass(found) else None


_MANAGER_CODE = asynccontextmanager(lambda: None).__code__  # type: ignore[arg-type,return-value]


def _show_managers(
    app: Sphinx,
    what: str,
    name: str,
    documented: Any,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str] | None:
    """Say what a method gives that is written as a generator: an async context manager."""
    if returns is None or getattr(documented, "__code__", None) is not _MANAGER_CODE:
        return None
    manager = re.sub(r"^.*AsyncIterator\[", "~contextlib.AbstractAsyncContextManager[", returns)
    return signature, manager


_NUMBER_WITH_NAME = re.compile(r"(?<== )[A-Z][A-Z0-9_]+\b")


def _show_numbers(
    app: Sphinx,
    what: str,
    name: str,
    documented: Any,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    """Show ``size: int = 1024`` for ``size: int = MOST``."""
    known = getattr(inspect.unwrap(documented), "__globals__", {})

    def number(match: re.Match[str]) -> str:
        value = known.get(match[0])
        return repr(value) if isinstance(value, int | float) else match[0]

    return None if signature is None else (_NUMBER_WITH_NAME.sub(number, signature), returns)


_MANAGER = re.compile(r" -> [\w.~]*AbstractAsyncContextManager\[(.+)\]")


class _Method(ExtendedPyMethod):  # type: ignore[misc]
    """A method, or the ``async with`` block that it gives and what the block is given."""

    def handle_signature(self, sig: str, signode: desc_signature) -> Any:
        block = _MANAGER.sub(r" -> \1", sig)
        if block != sig:
            self.options["async-with"] = ""
        return super().handle_signature(block, signode)


def setup(app: Sphinx) -> dict[str, bool]:
    # After preserve_defaults, which shows what the source has.
    app.connect("autodoc-before-process-signature", _show_defaults, priority=900)
    app.connect("autodoc-skip-member", _keep_fields)
    app.connect("autodoc-process-signature", _show_managers, priority=400)
    app.connect("autodoc-process-signature", _show_numbers)
    app.setup_extension("sphinxcontrib_trio")
    app.add_directive_to_domain("py", "method", _Method, override=True)
    app.connect("autodoc-process-docstring", _place_texts)
    return {"parallel_read_safe": True}
