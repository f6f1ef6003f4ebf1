"""Progress of long operations on images and kernels, told to a callback."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs

from .._public import public


@public
@attrs.frozen
class Progress:
    """One step of progress, of a download, a conversion or a bake.

    It is the argument of every ``progress`` callback, an async function.
    """

    #: ``"download"``, ``"load"`` (from an archive), ``"convert"`` or ``"verify"``; in a bake
    #: ``"boot"``, ``"wait"``, ``"warmup"``, ``"capture"`` or ``"publish"``; for a kernel
    #: ``"download"``, ``"unpack"`` or ``"build"``.
    phase: str
    #: The thing that is worked on, for people.
    item: str
    #: The bytes that are done; in the phase ``"build"`` the steps.
    done: int
    #: The bytes, or steps, altogether; ``None`` if they are not known.
    total: int | None


ProgressCallback = Callable[[Progress], Awaitable[None]]


async def report(
    callback: ProgressCallback | None, phase: str, item: str, done: int, total: int | None
) -> None:
    """Await ``callback`` with a step of progress, if there is a callback."""
    if callback is not None:
        await callback(Progress(phase, item, done, total))
