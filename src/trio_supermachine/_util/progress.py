"""Progress of long operations on images and kernels, told to a callback."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs

from .public import public


@public
@attrs.frozen
class Progress:
    """One step of progress, the argument of every ``progress`` callback.

    :ivar phase: of an image ``"download"``, ``"load"`` (from an archive), ``"convert"`` or
        ``"verify"``; of a bake ``"boot"``, ``"wait"``, ``"warmup"``, ``"capture"`` or
        ``"publish"``; of a kernel ``"download"``, ``"unpack"`` or ``"build"``.
    :ivar item: the thing that is worked on, for people.
    :ivar done: the bytes that are done; for ``"build"`` the steps.
    :ivar total: the bytes, or steps, altogether; ``None`` if they are not known.
    """

    phase: str
    item: str
    done: int
    total: int | None


ProgressCallback = Callable[[Progress], Awaitable[None]]


async def report(
    callback: ProgressCallback | None, phase: str, item: str, done: int, total: int | None
) -> None:
    """Await ``callback`` with a step of progress, if there is a callback."""
    if callback is not None:
        await callback(Progress(phase, item, done, total))
