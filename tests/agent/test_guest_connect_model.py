"""A connection through the agent does what plain TCP does, however its sides send, read and end."""

from __future__ import annotations

import attrs
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from ..support.connecting import PATIENCE, Maker, connecting, plain_tcp, reset, until_fds


@attrs.frozen
class Part:
    """What one side does: sends chunks, then ends or resets; and reads by so many bytes."""

    chunks: list[int]
    reads: int
    resets: bool = False


@attrs.frozen
class Seen:
    data: bytes
    end: str


def content(size: int, at: int) -> bytes:
    return bytes((at + n * 7) % 251 for n in range(min(size, 997))).ljust(size, b".")


def sent_by(part: Part) -> bytes:
    return b"".join(content(size, at) for at, size in enumerate(part.chunks))


def end_of(seen: Seen | None) -> str | None:
    return None if seen is None else seen.end


async def play(stream: trio.abc.HalfCloseableStream, part: Part, seen: list[Seen | None]) -> None:
    data = bytearray()
    me = len(seen)
    seen.append(None)
    broken = False  # as the sender found; Linux tells only once

    async def send(both: trio.CancelScope) -> None:
        nonlocal broken
        try:
            for at, size in enumerate(part.chunks):
                await stream.send_all(content(size, at))
            if part.resets:
                both.cancel()
            else:
                await stream.send_eof()
        except trio.BrokenResourceError:
            broken = True

    async def receive() -> None:
        end = "eof"
        try:
            while chunk := await stream.receive_some(part.reads):
                data.extend(chunk)
        except trio.BrokenResourceError:
            end = "reset"
        seen[me] = Seen(bytes(data), "reset" if broken else end)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, nursery.cancel_scope)
        await receive()
        if end_of(seen[me]) == "reset":
            nursery.cancel_scope.cancel()
    if part.resets:
        reset(stream)


async def conversation(connect: Maker, parts: tuple[Part, Part]) -> list[Seen | None]:
    seen: list[Seen | None] = []
    ends = await connect()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for stream, part in zip(ends, parts, strict=True):
                nursery.start_soon(play, stream, part, seen)
                await trio.lowlevel.checkpoint()
    for stream in ends:
        await trio.aclose_forcefully(stream)
    return seen


sizes = st.one_of(st.integers(1, 50), st.integers(1, 300_000))
orderly = st.builds(Part, st.lists(sizes, max_size=6), st.sampled_from([1000, 65536, 1 << 20]))
#: While it sends, Linux may well tell a reset to nobody, and then an end.
listening = st.builds(Part, st.lists(st.integers(1, 50), max_size=1), st.just(1000))
rude = st.builds(Part, st.lists(sizes, max_size=4), st.just(65536), st.just(True))


@settings(max_examples=40, deadline=None)
@given(host=orderly, program=orderly)
async def test_what_both_send_arrives_as_by_tcp(host: Part, program: Part) -> None:
    parts = (host, program)
    async with plain_tcp() as tcp, connecting() as (agent, connect):
        before = agent.open_fds()
        model = await conversation(tcp, parts)
        assert await conversation(connect, parts) == model
        assert model == [Seen(sent_by(program), "eof"), Seen(sent_by(host), "eof")]
        await until_fds(agent, before)


@settings(max_examples=40, deadline=None)
@given(first=rude, second=listening, host_is_rude=st.booleans())
async def test_a_reset_reaches_the_other_side_as_by_tcp(
    first: Part, second: Part, host_is_rude: bool
) -> None:
    parts = (first, second) if host_is_rude else (second, first)
    other = 1 if host_is_rude else 0
    async with plain_tcp() as tcp, connecting() as (agent, connect):
        before = agent.open_fds()
        for maker in (tcp, connect):
            seen = (await conversation(maker, parts))[other]
            assert seen is not None
            assert seen.end == "reset"
            assert sent_by(first).startswith(seen.data)
        await until_fds(agent, before)
