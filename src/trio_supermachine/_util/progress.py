"""What a long operation on an image tells its caller while it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs

from .._public import public


@public
@attrs.frozen
class Progress:
    """One step of progress, of a download, a conversion or a bake."""

    #: ``"download"``, ``"load"`` (from an archive), ``"convert"`` or ``"verify"``; in a bake
    #: ``"boot"``, ``"wait"``, ``"warmup"``, ``"capture"`` or ``"publish"``; for a kernel
    #: ``"unpack"`` or ``"build"``.
    phase: str
    #: The thing that is worked on, for people.
    item: str
    #: How much is done: bytes, or steps in the phase ``"build"``.
    done: int
    #: Of how much, or ``None`` if that is not known.
    total: int | None


ProgressCallback = Callable[[Progress], Awaitable[None]]


async def report(
    callback: ProgressCallback | None, phase: str, item: str, done: int, total: int | None
) -> None:
    """Tell ``callback``, if there is one."""
    if callback is not None:
        await callback(Progress(phase, item, done, total))
