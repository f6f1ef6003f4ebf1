"""``trio-supermachine run``: one command in a VM of its own."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, nullcontext
from typing import Final

import attrs
import trio

from .._nursery import open_flat_nursery
from ..config import VmConfig
from ..errors import ConfigError
from ..exec import ExecChild
from ..exec_builder import ExecBuilder
from ..images.prepare import prepare_image
from ..vm import Vm
from .failures import SIGNALLED, TIMED_OUT, CommandNotStarted
from .hostio import Output, forward_input, raw_terminal, terminal_size

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@attrs.frozen(kw_only=True)
class RunOptions:
    """What the user asked for."""

    image: str
    command: tuple[str, ...] = ()
    config: VmConfig = attrs.field(factory=VmConfig)
    environment: tuple[tuple[str, str], ...] = ()
    workdir: str | None = None
    user: str | None = None
    timeout: float | None = None
    interactive: bool = False
    tty: bool = False


async def run(options: RunOptions) -> int:
    """Run the command and give the exit code for this program.

    A signal that asks this program to end kills the command and the VM first.
    """
    if options.tty and options.interactive and not os.isatty(_STDIN):
        raise ConfigError("-t with -i needs a terminal as stdin; leave -t out")
    stopped_by = 0
    exit_code = 0

    async def watch_signals() -> None:
        nonlocal stopped_by
        async for signum in signals:
            stopped_by = signum
            nursery.cancel_scope.cancel()

    with trio.open_signal_receiver(*_STOPPING) as signals:
        async with open_flat_nursery() as nursery:
            nursery.start_soon(watch_signals)
            exit_code = await _run_image(options)
            nursery.cancel_scope.cancel()
    return SIGNALLED + stopped_by if stopped_by else exit_code


async def _run_image(options: RunOptions) -> int:
    image = await prepare_image(options.image)
    argv = (*image.config.entrypoint, *(options.command or image.config.cmd))
    if not argv:
        raise ConfigError(f"{options.image} has no command of its own; give one after the image")
    async with Vm.start(image, options.config, workload=False) as vm:
        builder = _exec_of(vm, options, argv)
        with trio.move_on_after(math.inf if options.timeout is None else options.timeout) as scope:
            returncode = await _run_command(builder, options)
        if scope.cancelled_caught:
            return TIMED_OUT
    return SIGNALLED - returncode if returncode < 0 else returncode


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
        if options.tty and (size := _window()) is not None:
            builder = builder.winsize(*size)
        stack.enter_context(raw_terminal(_STDIN) if raw else nullcontext())
        try:
            child = await stack.enter_async_context(builder.spawn())
        except OSError as exc:
            raise CommandNotStarted(os.fsdecode(exc.filename or "the command"), exc) from exc
        outputs = [Output(child.stdout, _STDOUT), Output(child.stderr, _STDERR)]
        async with open_flat_nursery() as nursery:
            async with open_flat_nursery() as copying:
                for output in outputs:
                    copying.start_soon(output.copy)
                if options.tty:
                    nursery.start_soon(_follow_size, resizes, child)
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


def _window() -> tuple[int, int] | None:
    return terminal_size(_STDOUT) or terminal_size(_STDIN)
