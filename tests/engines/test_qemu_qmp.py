"""QMP: the parser on its own, and the client with a real QEMU."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.host.assets import find_qemu
from trio_supermachine.hv.qemu.qmp import QmpClient, QmpError, QmpParser, QmpProtocolError

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=8), _json, max_size=4), max_size=6),
    st.lists(st.integers(1, 50), min_size=1),
)
def test_messages_come_out_however_the_bytes_are_cut(
    messages: list[dict[str, Any]], cuts: list[int]
) -> None:
    data = b"".join(json.dumps(message).encode() + b"\r\n" for message in messages)
    parser, got, turn = QmpParser(), [], 0
    while data:
        size = cuts[turn % len(cuts)]
        got += parser.feed(data[:size])
        data, turn = data[size:], turn + 1
    assert got == messages


@given(st.binary(max_size=400))
def test_garbage_is_refused_or_waits_for_more_but_never_breaks_the_parser(data: bytes) -> None:
    parser = QmpParser(max_line=100)
    try:
        messages = parser.feed(data)
    except QmpProtocolError:
        return
    assert all(isinstance(message, dict) for message in messages)


@pytest.mark.parametrize("tail", [b"", b"\n"])
def test_a_line_beyond_the_bound_is_refused(tail: bytes) -> None:
    parser = QmpParser(max_line=10)
    assert parser.feed(b'{"a":    ') == []
    with pytest.raises(QmpProtocolError, match="more than 10 bytes"):
        parser.feed(b"         1}" + tail)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(QmpProtocolError):
        QmpParser().feed(b"[" * 100_000 + b"\n")


@attrs.define
class Qemu:
    client: QmpClient
    process: subprocess.Popen[bytes]
    events: trio.MemoryReceiveChannel[tuple[str, Mapping[str, Any]]]


def _spawn() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        command = [str(find_qemu()), "-M", "none", "-nodefaults", "-display", "none"]
        command += ["-chardev", f"socket,id=qmp,fd={fd}", "-mon", "chardev=qmp,mode=control"]
        return ours, subprocess.Popen(command, pass_fds=[fd])


@asynccontextmanager
async def qemu() -> AsyncIterator[Qemu]:
    ours, process = _spawn()
    told, events = trio.open_memory_channel[tuple[str, Mapping[str, Any]]](10)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    client = QmpClient(stream, lambda name, data: told.send_nowait((name, data)))
    try:
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            with trio.fail_after(60):
                await client.negotiate()
            yield Qemu(client, process, events)
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        process.wait()


async def test_commands_are_answered() -> None:
    async with qemu() as q:
        assert (await q.client.execute("query-name")) == {}
        with pytest.raises(QmpError) as caught:
            await q.client.execute("no-such-command")
        assert caught.value.kind == "CommandNotFound"
        assert caught.value.command == "no-such-command"


async def test_each_of_many_commands_at_once_gets_its_own_answer() -> None:
    async with qemu() as q:

        async def list_root() -> None:
            assert isinstance(await q.client.execute("qom-list", {"path": "/"}), list)

        async def version() -> None:
            assert "qemu" in await q.client.execute("query-version")

        async def status() -> None:
            assert "status" in await q.client.execute("query-status")

        async with trio.open_nursery() as nursery:
            for ask in (list_root, version, status) * 20:
                nursery.start_soon(ask)


async def test_a_cancelled_command_does_not_confuse_the_next() -> None:
    async with qemu() as q:
        for steps in range(4):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(q.client.execute, "query-version")
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            assert "running" in await q.client.execute("query-status")


async def test_commands_fail_at_once_when_qemu_dies() -> None:
    async with qemu() as q:
        with trio.fail_after(60):
            q.process.kill()
            while True:
                try:
                    await q.client.execute("query-status")
                except trio.BrokenResourceError:
                    break
            with pytest.raises(trio.BrokenResourceError, match="query-status"):
                await q.client.execute("query-status")


async def test_events_are_told() -> None:
    async with qemu() as q:
        with trio.fail_after(60):
            await q.client.execute("quit")
            event = await q.events.receive()
        assert event == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
