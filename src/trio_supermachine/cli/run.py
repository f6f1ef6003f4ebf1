"""``trio-supermachine run``: one command in a VM of its own."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Final

import attrs
import trio

from .._util.nursery import open_flat_nursery
from .._util.progress import Progress, ProgressCallback
from ..api import Image, Vm, image_for_command, unbaked_image
from ..config.vm import VmConfig, refuse_unbuilt
from ..errors import BakeFailed, ConfigError
from ..images.policy import PullPolicy
from ..programs.builder import ExecBuilder
from ..programs.child import ExecChild
from .exits import NOT_EXECUTABLE, NOT_FOUND, SIGNALLED, TIMED_OUT, EarlyExit
from .hostio import Output, RawTerminal, forward_input, terminal_size
from .meter import Meter
from .publish import Publish

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_JOB_CONTROL: Final = (signal.SIGTSTP, signal.SIGCONT)


@attrs.frozen(kw_only=True)
class RunOptions:
    """Choices of the user."""

    image: str
    command: tuple[str, ...] = ()
    config: VmConfig = attrs.field(factory=VmConfig)
    platform: str | None = None
    pull: PullPolicy = PullPolicy.MISSING
    cold: bool = False
    quiet: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    workdir: str | None = None
    user: str | None = None
    timeout: float | None = None
    interactive: bool = False
    tty: bool = False
    publish: tuple[Publish, ...] = ()


async def run(options: RunOptions) -> int:
    """Run the command and give the exit code for this program.

    Cancelling it kills the command and the VM.
    """
    if options.tty and options.interactive and not os.isatty(_STDIN):
        raise ConfigError("-t with -i needs a terminal as stdin; leave -t out")
    with Meter() as meter:
        image, argv = await _prepare(options, _silent if options.quiet else meter.show)
    async with Vm.start(image, options.config, workload=False) as vm:
        for publish in options.publish:
            if (found := await publish.expose(vm)) is not None:
                print(found, file=sys.stderr, flush=True)
        builder = _exec_of(vm, options, argv)
        with trio.move_on_after(math.inf if options.timeout is None else options.timeout) as scope:
            returncode = await _run_command(builder, options)
        if scope.cancelled_caught:
            return TIMED_OUT
    return SIGNALLED - returncode if returncode < 0 else returncode


async def _prepare(
    options: RunOptions, progress: ProgressCallback
) -> tuple[Image, tuple[str, ...]]:
    """Give the image to start, and the command to run in it."""
    config = options.config
    refuse_unbuilt(config)
    if options.cold:
        image = await unbaked_image(
            options.image,
            pull=options.pull,
            platform=options.platform,
            engine=config.engine,
            progress=progress,
        )
    else:
        image = await _baked(options, progress)
    argv = (*image.config.entrypoint, *(options.command or image.config.cmd))
    if not argv:
        raise ConfigError(f"{options.image} has no command of its own; give one after the image")
    return image, argv


async def _baked(options: RunOptions, progress: ProgressCallback) -> Image:
    config = options.config
    builder = (
        Image.builder(options.image)
        .with_memory_mib(config.effective_memory_mib)
        .with_vcpus(config.effective_vcpus)
        .with_pull_policy(options.pull)
        .with_platform(options.platform)
        .with_engine(config.engine)
    )
    try:
        return await image_for_command(builder, progress)
    except BakeFailed as error:
        error.add_note("--cold runs it without a bake")
        raise


async def _silent(step: Progress) -> None:
    await trio.lowlevel.checkpoint()


def _exec_of(vm: Vm, options: RunOptions, argv: tuple[str, ...]) -> ExecBuilder:
    builder = vm.exec_builder().argv(argv)
    if options.tty:
        builder = builder.tty().env("TERM", os.environ.get("TERM") or "xterm")
    for key, value in options.environment:
        builder = builder.env(key, value)
    if options.workdir is not None:
        builder = builder.cwd(options.workdir)
    if options.user is not None:
        builder = builder.user(options.user)
    return builder


async def _run_command(builder: ExecBuilder, options: RunOptions) -> int:
    """Run it, connected to this program's files; gives its return code."""
    raw = options.tty and options.interactive
    async with AsyncExitStack() as stack:
        # From here on no change of the terminal's size is missed.
        resizes = stack.enter_context(trio.open_signal_receiver(signal.SIGWINCH))
        stops = stack.enter_context(trio.open_signal_receiver(*_JOB_CONTROL)) if raw else None
        if options.tty and (size := _window()) is not None:
            builder = builder.winsize(*size)
        terminal = stack.enter_context(RawTerminal(_STDIN)) if raw else None
        try:
            child = await stack.enter_async_context(builder.spawn())
        except OSError as exc:
            program = os.fsdecode(exc.filename or "the command")
            code = NOT_FOUND if isinstance(exc, FileNotFoundError) else NOT_EXECUTABLE
            raise EarlyExit(code, f"cannot run {program!r}: {exc.strerror or exc}") from exc
        outputs = [Output(child.stdout, _STDOUT), Output(child.stderr, _STDERR)]
        async with open_flat_nursery() as nursery:
            async with open_flat_nursery() as copying:
                for output in outputs:
                    copying.start_soon(output.copy)
                if options.tty:
                    nursery.start_soon(_follow_size, resizes, child)
                if stops is not None and terminal is not None:
                    nursery.start_soon(_follow_stops, stops, terminal)
                if options.interactive and child.stdin is not None:
                    nursery.start_soon(forward_input, _STDIN, child.stdin)
                elif not options.tty and child.stdin is not None:
                    await child.stdin.aclose()
                returncode = await child.wait()
                child.abort()  # what it left behind in its group ends with it, as in a container
                for output in outputs:
                    output.program_ended()
            nursery.cancel_scope.cancel()
    return returncode


async def _follow_size(resizes: AsyncIterator[int], child: ExecChild) -> None:
    async for _ in resizes:
        if (size := _window()) is not None:
            await child.resize(*size)


async def _follow_stops(signals: AsyncIterator[int], terminal: RawTerminal) -> None:
    """Leave the terminal to others while this program is stopped, as job control expects."""
    async for signum in signals:
        if signum == signal.SIGTSTP:
            terminal.restore()
            os.kill(os.getpid(), signal.SIGSTOP)
        terminal.make_raw()


def _window() -> tuple[int, int] | None:
    return terminal_size(_STDOUT) or terminal_size(_STDIN)
