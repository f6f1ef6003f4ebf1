"""The check that Trio runs the caller: elsewhere Trio's own errors do not say what to do."""

from __future__ import annotations

import trio

_REMEDY = (
    "trio-supermachine runs on Trio, and this call was not made by a Trio task: start the program"
    " by trio.run(main). How to come here from asyncio or from a thread, the documentation says in"
    " 'Use VMs from asyncio, or from blocking code'."
)


def require_trio() -> None:
    """Check that a Trio task makes this call. :raises RuntimeError: none does; it says what to do.

    Under asyncio, in another thread, or without any event loop, none does.
    """
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        raise RuntimeError(_REMEDY) from None
