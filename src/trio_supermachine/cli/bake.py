"""``trio-supermachine bake``: boot an image once, and keep it as a snapshot."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import click

from ..api import Image, Vm
from ..bake.store import Bake, BakeStore
from ..config.defaults import EngineName
from ..images.policy import PullPolicy
from .images import describe
from .interrupts import run_until_signal
from .meter import Meter

_STDERR: Final = 2


def bake(image: str, *, as_json: bool, **given: Any) -> None:
    """Bake an image, and print the bake."""
    baked = run_until_signal(partial(_bake, image, **given))
    click.echo(json.dumps(describe(baked), indent=2) if as_json else baked.fingerprint)


async def _bake(
    reference: str,
    *,
    progress: bool,
    name: str | None,
    memory: int,
    vcpus: int,
    environment: tuple[tuple[str, str], ...],
    cmd: str | None,
    entrypoint: str | None,
    user: str | None,
    workdir: str | None,
    guest_port: int | None,
    warmups: tuple[str, ...],
    trigger_timeout: float | None,
    platform: str | None,
    pull: str,
    engine: EngineName,
) -> Bake:
    builder = Image.builder(reference).with_memory_mib(memory).with_vcpus(vcpus)
    builder = builder.with_pull_policy(PullPolicy(pull)).with_engine(engine)
    builder = builder.with_platform(platform)
    for key, value in environment:
        builder = builder.with_env(key, value)
    if name is not None:
        builder = builder.with_name(name)
    if entrypoint is not None:
        builder = builder.with_entrypoint(_words("--entrypoint", entrypoint))
    if cmd is not None:
        builder = builder.with_cmd(_words("--cmd", cmd))
    if user is not None:
        builder = builder.with_user(user)
    if workdir is not None:
        builder = builder.with_workdir(workdir)
    if guest_port is not None:
        builder = builder.with_guest_port(guest_port)
    if trigger_timeout is not None:
        builder = builder.with_trigger_timeout(trigger_timeout)
    if warmups:
        tag = "shell:" + json.dumps(warmups)
        builder = builder.with_warmup(_warmup(warmups)).with_warmup_tag(tag)
    with Meter() as meter:
        image = await builder.build(meter.show if progress else None)
    assert image.snapshot is not None
    place = image.snapshot.directory
    return next(bake for bake in await BakeStore().list() if bake.directory == place)


def _warmup(commands: tuple[str, ...]) -> Callable[[Vm], Awaitable[None]]:
    async def run(vm: Vm) -> None:
        for command in commands:
            await vm.run_process(command, shell=True, stdout=_STDERR, stderr=_STDERR)

    return run


def _words(option: str, text: str) -> list[str]:
    try:
        words = json.loads(text)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise click.BadParameter(
            f'{text!r} is not a JSON list like ["sh", "-c", "true"]', param_hint=option
        )
    return words
