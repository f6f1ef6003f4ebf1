"""What a long operation on an image tells its caller while it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs

from .._public import public


@public
@attrs.frozen
class Progress:
    """One step of progress.

    :attr:`phase` is ``"download"``, ``"load"`` (from an archive), ``"convert"`` or
    ``"verify"``, in a bake ``"boot"``, ``"wait"``, ``"warmup"``, ``"capture"`` or ``"publish"``,
    and for a kernel ``"unpack"`` or ``"build"``; :attr:`item` is what it works on, for people;
    :attr:`done` and :attr:`total` are bytes, or for ``"build"`` steps (``total`` is `None` if
    unknown).
    """

    phase: str
    item: str
    done: int
    total: int | None


ProgressCallback = Callable[[Progress], Awaitable[None]]


async def report(
    callback: ProgressCallback | None, phase: str, item: str, done: int, total: int | None
) -> None:
    """Tell ``callback``, if there is one."""
    if callback is not None:
        await callback(Progress(phase, item, done, total))
