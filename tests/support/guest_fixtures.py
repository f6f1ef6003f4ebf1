"""An agent that was set up, and what its tests do with one again and again."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import guest_client as g
from .guest_client import Agent, frame, start_agent


@pytest.fixture
def bare_agent() -> Iterator[Agent]:
    with start_agent() as agent:
        yield agent


@pytest.fixture
def agent(bare_agent: Agent, tmp_path: Path) -> Agent:
    bare_agent.set_up(env=["FROM=image", f"PATH={os.environ['PATH']}"], workdir=str(tmp_path))
    return bare_agent


def run(agent: Agent, *argv: str, **options: object) -> tuple[int, bytes, bytes]:
    done = agent.exec(argv, **options)
    returncode = done.finish().returncode
    return returncode, bytes(done.output[1]), bytes(done.output[2])


def wait_until_gone(agent: Agent, pid: int) -> None:
    """Until a descendant of the agent has ended, the agent being free to work meanwhile."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        assert poll.poll(g.PATIENCE * 1000), f"{pid} lives on"
    finally:
        os.close(watch)


def open_fds(agent: Agent) -> int:
    return len(os.listdir(f"/proc/{agent.process.pid}/fd"))


def ping(agent: Agent) -> int:
    connection = agent.dial()
    connection.send(frame(g.PING))
    (value,) = struct.unpack("<Q", connection.expect(g.OK))
    assert connection.wait_end() == "shut"
    return int(value)


def wait_until_idle(agent: Agent) -> None:
    """Until the agent sleeps: what it is held back from is all that it could do."""
    stat = Path(f"/proc/{agent.process.pid}/stat")
    while stat.read_text().rpartition(") ")[2][0] != "S":
        os.sched_yield()
