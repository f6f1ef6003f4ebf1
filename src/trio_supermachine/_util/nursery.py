"""A nursery whose wrapping does not show."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_flat_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that raises a lone error as itself.

    The body's own exception comes out bare when no task failed for another reason, whatever
    groups the body itself raised; so does the only error of a task. Only when several things
    really failed is there a group.
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
        failures = [exc for exc in group.exceptions if not isinstance(exc, trio.Cancelled)]
        if len(failures) > 1:
            raise
        lone = failures[0] if failures else body_error or group.exceptions[0]
        context = lone.__context__
        try:
            raise lone
        finally:
            # As it was before the nursery's group became its context.
            lone.__context__ = context
            del lone, context, body_error, failures
