"""One bake: boot an image, wait until it is ready, warm it up, and capture it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio

from .._nursery import open_flat_nursery
from ..config import VmConfig
from ..errors import BakeFailed, CaptureFailed, StartTimeout, VmExited
from ..oci.progress import ProgressCallback, report
from ..resources import SnapshotResources
from ..trial import run_trial
from ..vm import Vm
from .image import Image

#: The default bound on the wait for a trigger, in seconds.
TRIGGER_TIMEOUT: Final = 60.0

Warmup = Callable[[Vm], Awaitable[object]]

_Wait = Callable[[], Awaitable[object]]

_SETTLED: Final = 1.0  # seconds for a workload that says nothing of ports
_HEARTBEAT: Final = 0.1  # seconds between heartbeats
_CONSOLE_TAIL: Final = 4096


@attrs.frozen(kw_only=True)
class BakePlan:
    """What happens between a boot and the capture.

    :ivar triggers: what to wait for; the first that comes counts. Without any it is what
        :func:`ready` says.
    :ivar timeout: how long to wait for it, in seconds.
    """

    triggers: SnapshotResources = attrs.field(factory=SnapshotResources)
    timeout: float = TRIGGER_TIMEOUT
    warmup: Warmup | None = None


async def bake(
    image: Image, plan: BakePlan, dest: Path, fingerprint: str, progress: ProgressCallback | None
) -> None:
    """Make the snapshot ``dest`` of an image that has none.

    Errors of the warm-up pass through. Cancelled or failed, it leaves nothing.

    :raises BakeFailed: the guest did not get as far as its capture.
    """
    config = VmConfig(memory_mib=image.memory_mib, vcpus=image.vcpus, engine=image.engine)
    try:
        await report(progress, "boot", image.reference, 0, None)
        async with Vm.start(image, config) as vm:
            await report(progress, "wait", image.reference, 0, None)
            await ready(vm, image, plan)
            if plan.warmup is not None:
                await report(progress, "warmup", image.reference, 0, None)
                await plan.warmup(vm)
            with trio.move_on_after(plan.timeout):
                await run_trial(vm)
            await trio.sleep(plan.triggers.quiesce_ms / 1000)
            await report(progress, "capture", image.reference, 0, None)
            await vm._capture(dest, None, fingerprint=fingerprint)
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


async def ready(vm: Vm, image: Image, plan: BakePlan) -> None:
    """Wait until a guest may be captured.

    Without a trigger in the plan: an image with a TCP port of its own is ready when something
    in the guest listens; one with another workload when that listens or has ended, or after a
    second; and one without a workload at once.

    :raises BakeFailed: that did not come in time, or cannot come any more.
    """
    triggers = plan.triggers
    listens = triggers.on_listener if triggers.has_trigger else serves(image)
    waits: list[_Wait] = []
    if listens:
        waits.append(partial(_listening, vm))
    elif not triggers.has_trigger and image.config.argv:
        waits += [vm.wait_listening, vm.wait_workload, partial(trio.sleep, _SETTLED)]
    if triggers.after_ms is not None:
        waits.append(partial(trio.sleep, triggers.after_ms / 1000))
    if triggers.at_heartbeat is not None:
        waits.append(partial(_heartbeats, vm, triggers.at_heartbeat))
    if not waits:
        return
    with trio.move_on_after(plan.timeout) as scope:
        await _first(waits)
    if scope.cancelled_caught:
        missing = "nothing in its guest listened on a TCP port" if listens else "its trigger failed"
        raise BakeFailed(
            f"{image.reference} was not ready to be captured after {plan.timeout:g} s: {missing};"
            " allow more with with_trigger_timeout(), or capture at another moment with"
            " with_snapshot(SnapshotResources(after_ms=...))",
            console=_console(vm),
        )


def serves(image: Image) -> bool:
    """Whether an image says that it serves a TCP port."""
    exposed = any(port.endswith("/tcp") for port in image.config.exposed_ports)
    return image.guest_port is not None or (bool(image.config.argv) and exposed)


async def _first(waits: Iterable[_Wait]) -> None:
    async def one(wait: _Wait) -> None:
        await wait()
        nursery.cancel_scope.cancel()

    async with open_flat_nursery() as nursery:
        for wait in waits:
            nursery.start_soon(one, wait)


async def _listening(vm: Vm) -> None:
    """Wait for a listener; give up if the workload that should listen has failed.

    One that ended well may have left a daemon that will listen.
    """

    async def fail_with_the_workload() -> None:
        with suppress(ProcessLookupError):  # there is none: some other program is to listen
            if returncode := await vm.wait_workload():
                raise BakeFailed(
                    f"the workload of {vm.image.reference} ended with return code {returncode}"
                    " before it listened on a TCP port",
                    console=_console(vm),
                )

    async with open_flat_nursery() as nursery:
        nursery.start_soon(fail_with_the_workload)
        await vm.wait_listening()
        nursery.cancel_scope.cancel()


async def _heartbeats(vm: Vm, count: int) -> None:
    for beat in range(count):
        if beat:
            await trio.sleep(_HEARTBEAT)
        await vm.ping()


def _console(vm: Vm) -> str:
    return vm.console.tail(_CONSOLE_TAIL).decode("utf-8", "replace")
