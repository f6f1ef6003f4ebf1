"""The marks of public classes: the name that users know, and no constructor.

A class says ``trio_supermachine.Vm`` in its ``repr``, in pickles and in the documentation, wherever
its module is. What only a factory makes has :class:`NoPublicConstructor` as its metaclass.
"""

from __future__ import annotations

from abc import ABCMeta
from types import FunctionType
from typing import Any, TypeVar

_PACKAGE = __name__.partition(".")[0]

T = TypeVar("T")


def public(cls: type[T]) -> type[T]:
    """Let a class, with its methods, belong to the package itself: a class decorator."""
    cls.__module__ = _PACKAGE
    for member in vars(cls).values():
        function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if isinstance(function, FunctionType):
            function.__module__ = _PACKAGE
    return cls


class NoPublicConstructor(ABCMeta):
    """The metaclass of classes that only this package makes, by ``Class._create(...)``.

    Calling such a class raises :exc:`TypeError`, which names what makes one, if the class has
    that in ``_made_by``.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made_by = getattr(cls, "_made_by", None)
        remedy = f"; {made_by} makes one" if made_by else ""
        raise TypeError(f"{_PACKAGE}.{cls.__qualname__} has no public constructor{remedy}")

    def _create(cls: type[T], *args: Any, **kwargs: Any) -> T:
        return super().__call__(*args, **kwargs)  # type: ignore[misc, no-any-return]
