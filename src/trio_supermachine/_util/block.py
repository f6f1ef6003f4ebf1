"""Blocks: async context managers that tell whoever uses them otherwise what to write."""

from __future__ import annotations

from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Final, NoReturn, TypeVar, final

T_co = TypeVar("T_co", covariant=True)


@final
class Block(AbstractAsyncContextManager[T_co]):
    """An async context manager whose misuse by ``await`` or ``with`` names the remedy.

    :param manager: what it wraps.
    :param usage: what to write behind ``async with``, such as ``"Vm.start(image) as vm"``.
    """

    __slots__ = ("_manager", "_usage")

    def __init__(self, manager: AbstractAsyncContextManager[T_co], usage: str) -> None:
        self._manager: Final = manager
        self._usage: Final = usage

    # Plain functions: the wrapped manager's own coroutines are awaited, and no others.

    def __aenter__(self) -> Coroutine[Any, Any, T_co]:
        return self._manager.__aenter__()

    def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> Coroutine[Any, Any, bool | None]:
        return self._manager.__aexit__(exc_type, exc, traceback)

    def __await__(self) -> NoReturn:
        self._refuse()

    def __enter__(self) -> NoReturn:
        self._refuse()

    def __exit__(self, *_: object) -> None:
        """Be there: Python looks for it before it calls ``__enter__``."""

    def _refuse(self) -> NoReturn:
        call = self._usage.rpartition("(")[0]
        raise TypeError(f"{call}(...) gives a block: write 'async with {self._usage}:'")
