"""One bake: a guest boots and is captured, its workload gets ready, and it is captured again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import trio

from .._util.nursery import open_flat_nursery
from .._util.progress import ProgressCallback, report
from ..errors import BakeFailed, CaptureFailed, StartTimeout, VmExited
from ..images.spec import ImageSpec
from ..vm.plan import Plan
from ..vm.running import RunningVm, open_vm
from ..vm.warm import run_trial
from .builder import BakeSettings
from .store import Moment

_Wait = Callable[[], Awaitable[object]]

_SETTLED: Final = 1.0  # seconds for a workload that says nothing of ports
_HEARTBEAT: Final = 0.1  # seconds between heartbeats


async def bake(
    settings: BakeSettings,
    plan: Plan,
    warm_up: Callable[[RunningVm], Awaitable[object]] | None,
    places: Mapping[Moment, Path],
    fingerprint: str,
    progress: ProgressCallback | None,
) -> None:
    """Start ``plan``, whose workload does not run yet, and make the snapshots of ``places``.

    Errors of the warm-up pass through. Cancelled or failed, no snapshot is half-made.

    :raises BakeFailed: the guest did not get as far as its capture.
    """
    image = plan.image
    try:
        await report(progress, "boot", image.reference, 0, None)
        async with open_vm(plan) as running:
            if Moment.BOOTED in places:
                await _warm(running, settings)
                if Moment.READY not in places:
                    await report(progress, "capture", image.reference, 0, None)
                await running.capture(
                    places[Moment.BOOTED],
                    fingerprint=fingerprint,
                    workload_started=not image.config.argv,
                )
            if Moment.READY not in places:
                return
            await report(progress, "wait", image.reference, 0, None)
            if image.config.argv:
                await running.start_workload()
            await _ready(running, settings)
            if warm_up is not None:
                await report(progress, "warmup", image.reference, 0, None)
                await warm_up(running)
            await _warm(running, settings)
            await trio.sleep(settings.triggers.quiesce_ms / 1000)
            await report(progress, "capture", image.reference, 0, None)
            await running.capture(places[Moment.READY], fingerprint=fingerprint)
    except VmExited as error:
        message = f"the guest of {image.reference} ended before it was captured ({error.reason})"
        raise BakeFailed(message, console=error.console) from error
    except StartTimeout as error:
        message = f"the guest of {image.reference} did not boot within {error.seconds:g} s"
        if error.detail:
            message += f"; {error.detail}"
        raise BakeFailed(message, console=error.console) from error
    except CaptureFailed as error:
        raise BakeFailed(f"{image.reference} could not be captured: {error}") from error


async def _warm(running: RunningVm, settings: BakeSettings) -> None:
    with trio.move_on_after(settings.trigger_timeout):
        await run_trial(running)


async def _ready(running: RunningVm, settings: BakeSettings) -> None:
    """Wait until a guest may be captured.

    Without a trigger in the settings: an image with a TCP port of its own is ready when something
    in the guest listens; one with another workload when that listens or has ended, or after a
    second; and one without a workload at once.

    :raises BakeFailed: that did not come in time, or cannot come any more.
    """
    image, triggers = running.plan.image, settings.triggers
    listens = triggers.on_listener if triggers.has_trigger else _serves(image)
    waits: list[_Wait] = []
    if listens:
        waits.append(partial(_listening, running))
    elif not triggers.has_trigger and image.config.argv:
        waits += [running.wait_listening, running.wait_workload, partial(trio.sleep, _SETTLED)]
    if triggers.after_ms is not None:
        waits.append(partial(trio.sleep, triggers.after_ms / 1000))
    if triggers.at_heartbeat is not None:
        waits.append(partial(_heartbeats, running, triggers.at_heartbeat))
    if not waits:
        return
    with trio.move_on_after(settings.trigger_timeout) as scope:
        await _first(waits)
    if scope.cancelled_caught:
        missing = "nothing in its guest listened on a TCP port" if listens else "its trigger failed"
        raise BakeFailed(
            f"{image.reference} was not ready to be captured after"
            f" {settings.trigger_timeout:g} s: {missing};"
            " allow more with with_trigger_timeout(), or capture at another moment with"
            " with_snapshot(SnapshotResources(after_ms=...))",
            console=running.console.text_tail(),
        )


def _serves(image: ImageSpec) -> bool:
    """Say whether an image declares that it serves a TCP port."""
    exposed = any(port.endswith("/tcp") for port in image.config.exposed_ports)
    return image.guest_port is not None or (bool(image.config.argv) and exposed)


async def _first(waits: Iterable[_Wait]) -> None:
    async def one(wait: _Wait) -> None:
        await wait()
        nursery.cancel_scope.cancel()

    async with open_flat_nursery() as nursery:
        for wait in waits:
            nursery.start_soon(one, wait)


async def _listening(running: RunningVm) -> None:
    """Wait for a listener; give up if the workload that should listen has failed.

    One that ended well may have left a daemon that will listen.
    """

    async def fail_with_the_workload() -> None:
        with suppress(ProcessLookupError):  # there is none: some other program is to listen
            if returncode := await running.wait_workload():
                raise BakeFailed(
                    f"the workload of {running.plan.image.reference} ended with return code"
                    f" {returncode} before it listened on a TCP port",
                    console=running.console.text_tail(),
                )

    async with open_flat_nursery() as nursery:
        nursery.start_soon(fail_with_the_workload)
        await running.wait_listening()
        nursery.cancel_scope.cancel()


async def _heartbeats(running: RunningVm, count: int) -> None:
    for beat in range(count):
        if beat:
            await trio.sleep(_HEARTBEAT)
        await running.ping()
