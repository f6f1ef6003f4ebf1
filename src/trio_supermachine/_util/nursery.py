"""A nursery that does not wrap a lone exception in a group."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_flat_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery that raises a lone error as itself.

    The only error of its tasks comes out bare. So does the body's own exception when no task
    failed beside it: if that is a group, it comes out as the body raised it. Only when several
    tasks, or a task and the body, failed is there a group of the nursery's own.
    """
    body_error: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as exc:
                body_error = exc
                raise
    except BaseExceptionGroup as group:
        raise_lone(group, body_error)
        raise
    finally:
        del body_error


def raise_lone(group: BaseExceptionGroup[BaseException], body: BaseException | None = None) -> None:
    """Raise the lone error in a nursery's group, and return if there are several.

    Call it while the group is being handled.

    :param body: what the nursery's body raised, to be preferred where all tasks were cancelled.
    """
    failures = [exc for exc in group.exceptions if not isinstance(exc, trio.Cancelled)]
    if len(failures) > 1:
        return
    lone = failures[0] if failures else body or group.exceptions[0]
    context = lone.__context__
    try:
        raise lone
    finally:
        # Restore the context, in the place of which "raise" has put the nursery's group.
        lone.__context__ = context
        del lone, context, group, body, failures
