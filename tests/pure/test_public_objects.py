"""Objects that users hold have what they may call, and say what to do when they are misused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from trio_supermachine import (
    EgressPolicy,
    ExecBuilder,
    ExecChild,
    ExecSignaler,
    Image,
    ImageConfig,
    OciImageBuilder,
    PoolBuilder,
    TcpForwarder,
    UdpForwarder,
    Vm,
)
from trio_supermachine.programs.running import RunningExec

IMAGE = Image(reference="none", config=ImageConfig(), layers=(), digest="sha256:0")


def members(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("cls", "made_by"),
    [
        (ExecBuilder, "Vm.exec_builder"),
        (ExecChild, "Vm.exec"),
        (ExecSignaler, "ExecChild.signaler"),
        (OciImageBuilder, "Image.builder"),
        (PoolBuilder, "Image.pool"),
        (TcpForwarder, "Vm.expose_tcp"),
        (UdpForwarder, "Vm.expose_udp"),
    ],
)
def test_what_only_a_call_makes_says_which(cls: type, made_by: str) -> None:
    with pytest.raises(TypeError, match=f"trio_supermachine.{cls.__name__} .*; {made_by} makes"):
        cls()


class NotAVm:
    """As much of a VM as the making of its execs needs."""

    def open_exec(self, request: object) -> AbstractAsyncContextManager[RunningExec]:
        raise NotImplementedError


def same_builders() -> tuple[ExecBuilder, ...]:
    vm = NotAVm()
    return tuple(
        ExecBuilder._create(vm.open_exec)
        .argv(["sh"])
        .env("A", "b")
        .winsize(80, 25)
        .stage_file("/a", b"data")
        for _ in range(2)
    )


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (*same_builders(), same_builders()[0]),  # the same command in another VM
        (*same_builders(), same_builders()[0].tty()),
        (
            Image.builder("oci:there").with_vcpus(2).with_cmd(["a"]),
            Image.builder("oci:there").with_cmd(["a"]).with_vcpus(2),
            Image.builder("oci:there").with_cmd(["a"]),
        ),
        (IMAGE.pool().min(1).max(2), IMAGE.pool().max(2).min(1), IMAGE.pool().min(1)),
    ],
    ids=["another VM", "ExecBuilder", "OciImageBuilder", "PoolBuilder"],
)
def test_builders_are_values(one: object, same: object, other: object) -> None:
    assert one is not same
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert len({one, same, other}) == 2
    for name in ("_spec", "_settings", "_options", "anything"):
        with pytest.raises(AttributeError):
            setattr(one, name, None)


def test_nothing_internal_is_on_the_objects() -> None:
    signals = {"send_signal", "terminate", "kill", "signal"}
    assert members(ExecSignaler) == signals
    assert members(ExecChild) == signals | {"returncode", "wait", "signaler", "resize", "abort"}
    run = {"spawn", "output", "output_with_cancel", "output_resilient"}
    files = {"stage_file", "stage_file_mode"}
    settings = {"argv", "chain", "env", "cwd", "user", "tty", "winsize", "timeout"}
    assert members(ExecBuilder) == run | files | settings
    bounds = {"min", "max", "idle_timeout", "acquire_timeout"}
    assert members(PoolBuilder) == bounds | {"restore_on_release", "config", "build"}
    assert all(name.startswith("with_") for name in members(OciImageBuilder) - {"build"})
    assert members(TcpForwarder) == {"stop", "aclose"}
    assert members(UdpForwarder) == {"dropped", "aclose"}
    policy = EgressPolicy.deny_all()
    fields = {"kind", "hosts", "cidrs", "ports", "connections", "bytes_per_second"}
    ways = {"allow", "deny", "allow_all", "deny_all", "deny_private", "parse", "with_limits"}
    assert members(type(policy)) == fields | ways


async def from_oci() -> None:
    await Image.from_oci("builtin:busybox")


async def from_snapshot() -> None:
    await Image.from_snapshot("/nowhere")


async def start() -> None:
    async with Vm.start(IMAGE):
        pass


async def acquire() -> None:
    async with IMAGE.acquire():
        pass


async def pool() -> None:
    async with IMAGE.pool().build():
        pass


def under_asyncio(call: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await call()

    asyncio.run(main())


def without_a_loop(call: Callable[[], Awaitable[None]]) -> None:
    next(iter(call().__await__()))


@pytest.mark.parametrize("run", [under_asyncio, without_a_loop])
@pytest.mark.parametrize("call", [from_oci, from_snapshot, start, acquire, pool])
def test_a_call_outside_trio_says_what_to_do(
    call: Callable[[], Awaitable[None]],
    run: Callable[[Callable[[], Awaitable[None]]], None],
) -> None:
    with pytest.raises(RuntimeError, match=r"runs on Trio.*start the program by trio\.run\(main\)"):
        run(call)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: "builtin:busybox", r"await Image\.from_oci\('builtin:busybox'\)"),
        (lambda: Image.from_oci("builtin:busybox"), r"still to be awaited: write 'await"),
        (lambda: None, "a VM is started from an Image, not None"),
    ],
    ids=["text", "coroutine", "None"],
)
def test_what_is_no_image_is_refused_and_told_how_to_get_one(
    make: Callable[[], object], told: str
) -> None:
    with pytest.raises(TypeError, match=told):
        Vm.start(make())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("block", "usage"),
    [
        (Vm.start(IMAGE), "Vm.start(...) gives a block: write 'async with Vm.start(image) as vm:'"),
        (
            IMAGE.acquire(),
            "image.acquire(...) gives a block: write 'async with image.acquire() as vm:'",
        ),
        (
            IMAGE.pool().build(),
            "image.pool().build(...) gives a block: write"
            " 'async with image.pool().build() as pool:'",
        ),
    ],
)
async def test_a_block_that_is_awaited_or_entered_without_async_says_what_to_write(
    block: Any, usage: str
) -> None:
    assert AbstractAsyncContextManager in type(block).__mro__
    with pytest.raises(TypeError) as caught:
        await block
    assert str(caught.value) == usage
    with pytest.raises(TypeError) as caught, block:
        pytest.fail("entered")
    assert str(caught.value) == usage


async def test_a_pool_that_is_not_built_says_what_to_write() -> None:
    builder: Any = IMAGE.pool().min(1)
    remedy = r"^write 'async with image\.pool\(\)\.\.\.\.build\(\) as pool:'$"
    with pytest.raises(TypeError, match=remedy):
        async with builder:
            pytest.fail("entered")
    with pytest.raises(TypeError, match=remedy), builder:
        pytest.fail("entered")
