"""Checks of the fields of configurations: validators and converters for attrs.

A validator is called with the instance, the field and the value. Each raises :exc:`ConfigError`,
which names the field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import attrs

from .._util import validators as check
from .._util.validators import StrPath
from ..errors import ConfigError

Validator: TypeAlias = Callable[[Any, "attrs.Attribute[Any]", Any], None]

T = TypeVar("T")


def integer(minimum: int, maximum: int | None = None) -> Validator:
    """Make a validator of integers within bounds."""

    def validate(_instance: object, field: attrs.Attribute[Any], value: object) -> None:
        check.integer(field.name, value, minimum, maximum)

    return validate


def optional_integer(minimum: int, maximum: int | None = None) -> Validator:
    """Make a validator of integers within bounds, and of ``None``."""
    return attrs.validators.optional(integer(minimum, maximum))


def boolean(_instance: object, field: attrs.Attribute[Any], value: object) -> None:
    """Check that a value is ``True`` or ``False``."""
    check.boolean(field.name, value)


def seconds(_instance: object, field: attrs.Attribute[Any], value: object) -> None:
    """Check that a value is a number of seconds above 0."""
    check.seconds(field.name, value)


def instance(cls: type, what: str) -> Validator:
    """Make a validator of instances of ``cls``, which ``what`` calls by its article and name."""

    def validate(_instance: object, field: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, cls):
            raise ConfigError(f"{field.name} must be {what}, not {value!r}")

    return validate


def instances(values: Iterable[T], cls: type[T], one: str, what: str) -> tuple[T, ...]:
    """Convert an iterable of instances of ``cls`` to a tuple.

    :param one: the word for an element, with its article.
    :param what: the name of the class, with its article.
    """
    found = tuple(values)
    for value in found:
        if not isinstance(value, cls):
            raise ConfigError(f"{one} must be {what}, not {value!r}")
    return found


def optional_path(value: StrPath | None) -> Path | None:
    """Convert a host path, unless it is ``None``."""
    return None if value is None else check.host_path(value)
