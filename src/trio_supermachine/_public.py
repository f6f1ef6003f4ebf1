"""Marks of public classes: the name that users know, and no constructor.

A class is ``trio_supermachine.Vm`` in its ``repr``, in pickles and in the documentation, wherever
its module is: :func:`public` says so. A class that only a factory makes has
:class:`NoPublicConstructor` as its metaclass.
"""

from __future__ import annotations

import inspect
from abc import ABCMeta
from types import FunctionType
from typing import Any, TypeVar

_PACKAGE = __name__.partition(".")[0]

T = TypeVar("T")


def public(cls: type[T]) -> type[T]:
    """Let a class and its methods belong to the package itself: the outermost class decorator.

    So do methods that it inherits from a class of this package that is not public. These are
    shared with that class, and belong to the first public class that is made of it.

    Annotations of the class are evaluated here, in the module that has their names:
    :func:`typing.get_type_hints` would look for these in the package.
    """
    cls.__annotations__ = inspect.get_annotations(cls, eval_str=True)
    cls.__module__ = _PACKAGE
    for member in vars(cls).values():
        for function in _functions(member):
            function.__module__ = _PACKAGE
    for name in dir(cls):
        if not name.startswith("_"):
            for function in _functions(inspect.getattr_static(cls, name)):
                if function.__module__.startswith(f"{_PACKAGE}."):
                    function.__module__ = _PACKAGE
                    function.__qualname__ = f"{cls.__qualname__}.{function.__name__}"
    return cls


def _functions(member: object) -> list[FunctionType]:
    """Give the functions that a member of a class is made of."""
    match member:
        case property():
            parts: tuple[object, ...] = (member.fget, member.fset, member.fdel)
        case staticmethod() | classmethod():
            parts = (member.__func__,)
        case _:
            parts = (member,)
    return [part for part in parts if isinstance(part, FunctionType)]


class NoPublicConstructor(ABCMeta):
    """Metaclass of classes that only this package makes, by ``Class._create(...)``.

    A call of such a class raises :exc:`TypeError`. Its message names the factory, if the class has
    that as ``_made_by``.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made_by = getattr(cls, "_made_by", None)
        remedy = f"; {made_by} makes one" if made_by else ""
        raise TypeError(f"{_PACKAGE}.{cls.__qualname__} has no public constructor{remedy}")

    def _create(cls: type[T], *args: Any, **kwargs: Any) -> T:
        # ``cls`` is an instance of this metaclass, which its annotation as type[T] cannot say.
        made: T = super().__call__(*args, **kwargs)  # type: ignore[misc]
        return made
