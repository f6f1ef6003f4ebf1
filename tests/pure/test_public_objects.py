"""Objects that users hold have what they may call, and say what to do when they are misused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from trio_supermachine import (
    EgressPolicy,
    ExecBuilder,
    ExecChild,
    ExecSignaler,
    Image,
    ImageConfig,
    TcpForwarder,
    UdpForwarder,
    Vm,
)

IMAGE = Image(reference="none", config=ImageConfig(), layers=(), digest="sha256:0")


def members(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("cls", "made_by"),
    [
        (ExecBuilder, "Vm.exec_builder"),
        (ExecChild, "Vm.exec"),
        (ExecSignaler, "ExecChild.signaler"),
        (TcpForwarder, "Vm.expose_tcp"),
        (UdpForwarder, "Vm.expose_udp"),
    ],
)
def test_what_only_a_call_makes_says_which(cls: type, made_by: str) -> None:
    with pytest.raises(TypeError, match=f"trio_supermachine.{cls.__name__} .*; {made_by} makes"):
        cls()


def test_nothing_internal_is_on_the_objects() -> None:
    signals = {"send_signal", "terminate", "kill", "signal"}
    assert members(ExecSignaler) == signals
    assert members(ExecChild) == signals | {"returncode", "wait", "signaler", "resize", "abort"}
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
