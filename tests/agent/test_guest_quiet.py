"""The agent around a capture: silent when it is told to be, and in a copy a new one."""

from __future__ import annotations

import os
import select
import signal
import struct
from pathlib import Path

import pytest

from ..support import guest_client as g
from ..support.guest_client import Agent, frame, packet, restore_payload, string, u32
from ..support.guest_fixtures import (
    agent,
    bare_agent,
    open_fds,
    ping,
    run,
    wait_until_gone,
    wait_until_idle,
)

__all__ = ["agent", "bare_agent"]  # fixtures

# --- the silence ---


def test_a_silent_agent_says_nothing_and_goes_on_after_it(agent: Agent) -> None:
    done = agent.exec(["seq", "2000000"], window=1 << 30)
    done.started()
    for _ in range(5):
        done.step()
        agent.freeze()
        wait_until_idle(agent)
        assert not select.select([agent.sock], [], [], 0)[0]
        agent.thaw()
    assert done.finish().returncode == 0
    assert bytes(done.output[1]) == b"".join(b"%d\n" % n for n in range(1, 2_000_001))


def test_silence_ends_with_a_whole_packet_when_nobody_reads(agent: Agent) -> None:
    done = agent.exec(["cat", "/dev/zero"], window=1 << 30)
    done.started()
    done.until(lambda: len(done.output[1]) > 1_000_000)
    # What the socket holds is more than one read; the parser asserts that packets are whole.
    agent.freeze()
    assert not agent.buffer
    agent.thaw()
    done.until(lambda: len(done.output[1]) > 2_000_000)
    done.connection.reset()


def test_what_comes_right_after_the_thaw_counts(agent: Agent) -> None:
    connection = agent.dial()
    agent.until(lambda: connection.open)
    agent.freeze()
    connection.send(frame(g.PING))
    agent.thaw()
    connection.expect(g.OK)


@pytest.mark.parametrize(
    "wrong",
    [
        [packet(g.OP_THAW, 0, to=0)],
        [packet(g.OP_RESET, 0, to=0)],
        [packet(g.OP_FROZEN, 0, to=0)],
        [packet(g.OP_FREEZE, 0, to=0), packet(g.OP_FREEZE, 0, to=0)],
        [packet(g.OP_FREEZE, 0, to=0), packet(g.REQUEST, 7)],
        [packet(g.OP_FREEZE, 0, to=0), packet(g.RST, 7)],
        [packet(g.OP_FREEZE, 1, to=0)],
        [packet(g.OP_FREEZE, 0, to=1)],
        [packet(g.OP_FREEZE, 0, b"x", to=0)],
        [packet(20, 0, to=0)],
    ],
)
def test_a_carrier_that_breaks_the_silences_order_ends_the_machine(
    agent: Agent, wrong: list[bytes]
) -> None:
    agent.send(b"".join(wrong))
    assert agent.process.wait(g.PATIENCE) == 0


# --- the copy ---


def test_in_a_copy_no_connection_of_the_original_lives(agent: Agent, tmp_path: Path) -> None:
    fds = open_fds(agent)
    running = agent.exec(["sleep", "1000"])
    pid = running.started()
    writing = agent.dial()
    writing.send(frame(g.WRITE_FILE, string("half") + u32(0o644)) + frame(g.DATA, b"half"))
    writing.expect(g.OK)
    half_a_request = agent.dial()
    half_a_request.send(frame(g.PING)[:5])
    agent.until(lambda: half_a_request.open)
    agent.freeze()
    agent.restore()
    wait_until_gone(agent, pid)
    assert not list(tmp_path.iterdir())
    assert agent.lifelines == 2
    assert run(agent, "echo", "new") == (0, b"new\n", b"")
    assert open_fds(agent) == fds


def test_a_copy_of_a_copy_is_one_too(agent: Agent) -> None:
    for _ in range(3):
        agent.freeze()
        agent.restore(os.urandom(512))
    assert agent.lifelines == 4
    assert ping(agent)


def test_resets_that_the_original_owed_are_not_sent_by_the_copy(agent: Agent) -> None:
    # They come in one piece with FREEZE, so that some are still owed when it ends the sending.
    nobody = b"".join(packet(g.RW, port, b"x") for port in range(10_000, 10_050))
    agent.send(nobody + packet(g.OP_FREEZE, 0, to=0))
    agent.until(lambda: agent.frozen)
    owed = 50 - agent.resets
    agent.restore()
    ping(agent)
    assert agent.resets == 50 - owed


def test_the_workload_lives_on_in_a_copy(bare_agent: Agent, tmp_path: Path) -> None:
    script = "trap 'exit 7' TERM; touch started; while :; do sleep 0.05; done"
    bare_agent.set_up(workload=["sh", "-c", script], workdir=str(tmp_path))
    run(bare_agent, "sh", "-c", "until [ -e started ]; do sleep 0.01; done")
    forgotten = bare_agent.dial()
    forgotten.send(frame(g.WORKLOAD_WAIT))
    ping(bare_agent)
    bare_agent.freeze()
    bare_agent.restore()
    waiter = bare_agent.dial()
    waiter.send(frame(g.WORKLOAD_WAIT))
    signaller = bare_agent.dial()
    signaller.send(frame(g.WORKLOAD_SIGNAL, struct.pack("<i", signal.SIGTERM)))
    signaller.expect(g.OK)
    assert struct.unpack_from("<i", waiter.expect(g.EXIT)) == (7,)


# --- the lifeline ---


def test_a_lost_lifeline_is_dialled_once_more(agent: Agent) -> None:
    assert agent.lifeline is not None
    running = agent.exec(["sleep", "1000"])
    running.started()
    agent.lifeline.reset()
    agent.renew()
    assert running.signal(signal.SIGKILL) == 0  # other connections are not concerned
    running.finish()
    agent.lifeline.shut()
    agent.until(lambda: agent.lifelines == 3)
    agent.renew()
    assert ping(agent)


def test_without_an_answer_on_the_second_lifeline_the_machine_ends(agent: Agent) -> None:
    assert agent.lifeline is not None
    agent.lifeline.reset()
    agent.greeted(1).reset()
    assert agent.process.wait(g.PATIENCE) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        frame(g.RESTORE),
        frame(g.RESTORE, restore_payload(bytes(31))),
        frame(g.RESTORE, restore_payload(bytes(513))),
        frame(g.RESTORE, restore_payload(machine_id="0" * 31)),
        frame(g.RESTORE, restore_payload(machine_id="A" * 32)),
        frame(g.RESTORE, restore_payload(boot_id="0" * 36)),
        frame(g.RESTORE, restore_payload(boot_id="01234567-89ab-cdef-0123-456789abcdef0")),
        frame(g.RESTORE, restore_payload() + b"x"),
        frame(g.SETUP, restore_payload()),
        frame(g.PING),
    ],
)
def test_a_wrong_answer_on_the_second_lifeline_ends_the_machine(agent: Agent, wrong: bytes) -> None:
    assert agent.lifeline is not None
    agent.lifeline.reset()
    agent.greeted(1).send(wrong)
    assert agent.process.wait(g.PATIENCE) == 0


def test_another_version_is_an_error_that_says_so(agent: Agent) -> None:
    assert agent.lifeline is not None
    agent.lifeline.reset()
    lifeline = agent.greeted(1)
    lifeline.send(frame(g.RESTORE, restore_payload(version=1)))
    assert "version" in lifeline.error()[1]


def test_nobody_restores_a_machine_that_was_not_set_up(bare_agent: Agent) -> None:
    bare_agent.greeted(0).send(frame(g.RESTORE, restore_payload()))
    assert bare_agent.process.wait(g.PATIENCE) == 0
    assert bare_agent.lifelines == 1
