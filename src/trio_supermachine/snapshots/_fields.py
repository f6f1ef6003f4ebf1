"""Fields of a snapshot's metadata: their checks, and their way to JSON and back.

The checks run whenever a value is made. So whatever is written can be read, and a hostile file
obeys the same bounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import attrs

_MAX_TEXT = 4096
_MAX_SHORT = 256
_MAX_FACTS = 64
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)

T = TypeVar("T")
Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def text(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Check that a value is a string, long enough for a path or a reference."""
    _text(attribute.name, value, _MAX_TEXT)


def short_text(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Check that a value is a string as short as a name."""
    _text(attribute.name, value, _MAX_SHORT)


def path(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Check that a value is an absolute path."""
    if not isinstance(value, Path) or not value.is_absolute():
        raise ValueError(f"{attribute.name} is not an absolute path")
    _text(attribute.name, str(value), _MAX_TEXT)


def digest(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Check that a value is a SHA-256 in hexadecimal."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{attribute.name} is not a SHA-256 in hexadecimal")


def mapping_of_text(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Check that a value is a mapping of a few strings to strings."""
    if not isinstance(value, Mapping) or len(value) > _MAX_FACTS:
        raise ValueError(f"{attribute.name} is not a mapping, or too large")
    for key, fact in value.items():
        _text(attribute.name, key, _MAX_SHORT)
        _text(attribute.name, fact, _MAX_TEXT)


def integer(low: int, high: int) -> Validator:
    """Make a check for integers of a range, both ends included. JSON's true and false are none."""

    def check(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{attribute.name} is not a number from {low} to {high}")

    return check


def encode(value: Any) -> Any:
    """Convert an attrs value, a path, a mapping or a tuple of such to what ``json`` can write."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return {field.name: encode(getattr(value, field.name)) for field in attrs.fields(type(value))}


def decode(cls: type[T], document: object) -> T:
    """Make an attrs value of what :func:`encode` gave; the class's validators check it.

    :raises ValueError: a key is missing or not known, or a value is out of bounds.
    """
    # T has no bound: no type says "a class that attrs made" and keeps what the caller gets.
    hints = _hints(cls)  # type: ignore[arg-type]
    if not isinstance(document, dict):
        raise ValueError(f"there is no {cls.__name__} where there should be one")
    names = {field.name for field in attrs.fields(cls)}  # type: ignore[arg-type]
    if document.keys() != names:
        wrong = sorted(document.keys() ^ names)
        raise ValueError(f"{str(wrong[0])[:40]!r} is missing, or not known")
    return cls(**{name: _decode(hints[name], item, name) for name, item in document.items()})


def _decode(hint: Any, item: object, name: str) -> object:
    if get_origin(hint) is UnionType:
        return None if item is None else _decode(get_args(hint)[0], item, name)
    if get_origin(hint) is tuple:
        if not isinstance(item, list):
            raise ValueError(f"{name} is not a list")
        return tuple(_decode(get_args(hint)[0], part, name) for part in item)
    if hint is Path:
        if not isinstance(item, str):
            raise ValueError(f"{name} is not a path")
        return Path(item)
    if isinstance(hint, type) and attrs.has(hint) and not isinstance(item, hint):
        return decode(hint, item)
    return item


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _text(name: str, value: object, limit: int) -> None:
    if not isinstance(value, str) or len(value) > limit or "\0" in value:
        raise ValueError(f"{name} is not a proper string of at most {limit} characters")
