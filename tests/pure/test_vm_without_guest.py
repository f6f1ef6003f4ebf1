"""How VMs start, stand, are captured and end, on a machine whose guest is played here."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_supermachine import (
    ExecBuilder,
    ExecEof,
    ExecOutcome,
    NotSupported,
    RestoreTimeout,
    SnapshotInvalid,
    StartTimeout,
    VmConfig,
    VmExited,
)
from trio_supermachine.agent import wire
from trio_supermachine.agent.wire import FrameType
from trio_supermachine.hv.base import MachineSpec
from trio_supermachine.hv.fake import FakeEngine, FakeGuest
from trio_supermachine.images.spec import ImageSpec, image_of
from trio_supermachine.oci.config import ImageConfig
from trio_supermachine.programs.child import open_child
from trio_supermachine.programs.request import exec_request
from trio_supermachine.vm import plan as planning
from trio_supermachine.vm.limits import memory_admission, spawn_concurrency
from trio_supermachine.vm.plan import KernelFacts, Plan, plan_start
from trio_supermachine.vm.running import RunningVm, open_vm
from trio_supermachine.vsock.stream import VsockStream

from ..support.agent_process import AgentProcess
from ..support.fake_agent import PlayedAgent
from .test_fake_machine import StepCanceller

IMAGE = ImageSpec(reference="played", config=ImageConfig(), layers=(), digest="sha256:" + "0" * 64)
KERNEL = KernelFacts(kernel="0" * 64, initramfs="0" * 64, release="6.1-fake")


def boot(engine: FakeEngine, config: VmConfig | None = None, **spec: object) -> Plan:
    """Plan a boot of nothing."""
    return Plan(
        image=IMAGE,
        config=config or VmConfig(),
        engine=engine,
        host={"machine": "1"},
        spec=MachineSpec(memory_mib=64, **spec),  # type: ignore[arg-type]
        layers=(),
        hostname="played",
        kernel=KERNEL,
    )


async def be_silent(guest: FakeGuest) -> None:
    await guest.write_console(b"booting\xff\r\n")


# --- starts ---


async def test_a_guest_that_does_not_answer_is_a_timeout_with_its_console(
    autojump_clock: MockClock,
) -> None:
    before = trio.current_time()
    with pytest.raises(StartTimeout) as caught:
        async with open_vm(boot(FakeEngine(be_silent), VmConfig(start_timeout=7))):
            raise AssertionError("it was opened")
    assert trio.current_time() - before == pytest.approx(7)
    assert (caught.value.seconds, caught.value.console) == (7, "booting\ufffd\r\n")


async def test_a_guest_that_says_nothing_is_explained(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    initramfs = tmp_path / "initramfs"
    initramfs.write_bytes(b"x" * 123)
    with pytest.raises(StartTimeout, match="its console is empty") as caught:
        async with open_vm(boot(FakeEngine(), kernel=initramfs, initramfs=initramfs)):
            raise AssertionError("it was opened")
    for word in ("without a hypervisor", "64 MiB", "6.1-fake", str(initramfs), "123 bytes"):
        assert word in caught.value.detail


async def test_a_guest_that_ends_before_it_answers_is_told_as_itself() -> None:
    async def panic(guest: FakeGuest) -> None:
        await guest.write_console(b"Kernel panic - not syncing: no init\r\n")
        guest.end("reset")

    with pytest.raises(VmExited, match="no init") as caught:
        async with open_vm(boot(FakeEngine(panic))):
            raise AssertionError("it was opened")
    assert caught.value.reason == "reset"
    assert memory_admission.statistics().in_use == 0


async def test_starts_beyond_the_limit_wait_for_their_turn(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def take_a_minute(spec: MachineSpec) -> None:
        await trio.sleep(60)

    engine = FakeEngine(PlayedAgent(), before_open=take_a_minute)
    monkeypatch.setattr(spawn_concurrency, "limit", 2)
    started: list[float] = []

    async def start() -> None:
        async with open_vm(boot(engine)):
            started.append(trio.current_time())
            await trio.sleep(1000)

    before = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(start)
    assert [round(time - before) for time in started] == [60, 60, 120, 120, 180]
    assert engine.machines == []


async def test_cancelling_a_start_anywhere_leaves_no_machine() -> None:
    engine = FakeEngine(PlayedAgent())
    for steps in range(1, 1000):
        opened = False
        with trio.CancelScope() as scope, StepCanceller(steps, scope) as canceller:
            async with open_vm(boot(engine)):
                opened = canceller.left > 0
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert engine.machines == []
        assert memory_admission.statistics().in_use == 0
        if opened:
            assert steps > 10
            return
    raise AssertionError("the start never came to its end")


# --- ends ---


async def test_a_guest_that_ends_cancels_the_body_and_surfaces_bare() -> None:
    told: list[str] = []

    async def call(running: RunningVm) -> None:
        with pytest.raises(VmExited) as caught:
            await running.wait_workload()
        told.append(caught.value.reason)

    async def never(guest: FakeGuest, stream: VsockStream) -> None:
        await trio.sleep_forever()

    engine = FakeEngine(PlayedAgent({FrameType.WORKLOAD_WAIT: never}))
    async with trio.open_nursery() as outside:
        with pytest.raises(VmExited) as caught:
            async with open_vm(boot(engine)) as running, trio.open_nursery() as nursery:
                outside.start_soon(call, running)
                nursery.start_soon(running.wait_workload)
                await wait_all_tasks_blocked()
                engine.machines[0].guest.end("reset")
                await trio.sleep_forever()
    assert caught.value.reason == "reset"
    assert told == ["reset"]
    assert running.exited is caught.value
    with pytest.raises(VmExited):
        await running.ping()


async def test_stopping_asks_the_guest_and_the_block_goes_on() -> None:
    agent = PlayedAgent()
    agent.answers[FrameType.SHUTDOWN] = _power_off
    async with open_vm(boot(FakeEngine(agent))) as running:
        await running.stop(1)
        assert agent.heard[-1] == FrameType.SHUTDOWN
        assert running.exited is not None
        assert running.exited.reason == "shutdown"
        await trio.lowlevel.checkpoint()


async def _power_off(guest: FakeGuest, stream: VsockStream) -> None:
    await stream.send_all(wire.frame(FrameType.OK))
    guest.end("shutdown")


async def test_a_guest_that_does_not_stop_is_killed_behind_the_grace(
    autojump_clock: MockClock,
) -> None:
    engine = FakeEngine(PlayedAgent())
    async with open_vm(boot(engine)) as running:
        engine.machines[0].guest.hang()
        before = trio.current_time()
        await running.stop(10)
        assert trio.current_time() - before == pytest.approx(12)  # 2 s for the power to go
        assert running.exited is not None
        assert running.exited.reason == "stopped"


# --- pauses and captures ---


async def test_calls_wait_for_a_paused_guest_which_hears_of_none_that_is_given_up(
    autojump_clock: MockClock,
) -> None:
    agent = PlayedAgent()
    async with open_vm(boot(FakeEngine(agent))) as running:
        await running.pause()
        await running.pause()
        with trio.move_on_after(100) as silence:
            await running.ping()
        assert silence.cancelled_caught
        heard = len(agent.heard)
        await running.resume()
        await running.resume()
        await running.ping()
        clock, pong = FrameType.SET_CLOCK, FrameType.PING
        assert agent.heard[heard:] == [clock, clock, pong]


async def test_a_capture_freezes_the_guest_around_its_moment_and_copies_are_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = PlayedAgent()
    engine = FakeEngine(agent, name="qemu")
    async with open_vm(boot(engine)) as running:
        engine.machines[0].guest.write_page(7, b"in memory")
        heard = len(agent.heard)
        snapshot = await running.capture(tmp_path / "snapshot")
        assert agent.heard[heard:] == [FrameType.FREEZE, FrameType.SET_CLOCK, FrameType.THAW]

    async def choose(*_: object) -> FakeEngine:
        return engine

    monkeypatch.setattr(planning, "choose_engine", choose)
    plan = await plan_start(image_of(snapshot), VmConfig())
    assert plan.started_by == "restore"
    agent.heard.clear()
    async with open_vm(plan) as running:
        assert agent.heard == [FrameType.RESTORE]
        (machine,) = engine.machines
        assert machine.guest.read_page(7).rstrip(b"\0") == b"in memory"
        machine.guest.write_page(8, b"changed")
        diff = await running.capture(tmp_path / "diff", base=snapshot)
    async with open_vm(await plan_start(image_of(diff), VmConfig())):
        (machine,) = engine.machines
        pages = [machine.guest.read_page(number).rstrip(b"\0") for number in (7, 8)]
        assert pages == [b"in memory", b"changed"]

    silent = attrs.evolve(plan, engine=FakeEngine(be_silent, name="qemu"))
    silent = attrs.evolve(silent, config=VmConfig(restore_timeout=0.05))
    with pytest.raises(RestoreTimeout) as timeout:
        async with open_vm(silent):
            raise AssertionError("it was opened")
    assert timeout.value.seconds == 0.05
    snapshot.state.unlink()
    with pytest.raises(SnapshotInvalid, match="was removed"):
        async with open_vm(plan):
            raise AssertionError("it was opened")


async def test_cancelling_a_capture_anywhere_thaws_the_guest_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    agent = PlayedAgent()
    async with open_vm(boot(FakeEngine(agent))) as running:
        for steps in range(1, 1000):
            agent.heard.clear()
            with trio.CancelScope() as scope, StepCanceller(steps, scope):
                await running.capture(tmp_path / "snapshot")
            if not scope.cancelled_caught:
                assert steps > 10
                return
            assert os.listdir(tmp_path) == []
            if FrameType.FREEZE in agent.heard:
                assert agent.heard[-1] == FrameType.THAW
            await running.ping()
    raise AssertionError("the capture never came to its end")


async def test_a_guest_without_a_freezer_cannot_be_captured(tmp_path: Path) -> None:
    async def refuse(guest: FakeGuest, stream: VsockStream) -> None:
        await stream.send_all(wire.error(errno.EOPNOTSUPP, "no cgroups"))

    agent = PlayedAgent({FrameType.FREEZE: refuse})
    async with open_vm(boot(FakeEngine(agent))) as running:
        with pytest.raises(NotSupported, match="CONFIG_CGROUPS"):
            await running.capture(tmp_path / "snapshot")
        assert os.listdir(tmp_path) == []
        await running.ping()


@pytest.mark.parametrize(
    "answer", [wire.frame(FrameType.ERROR, b"x"), wire.frame(FrameType.OK, b"x")]
)
async def test_an_answer_that_makes_no_sense_is_a_failed_call(answer: bytes) -> None:
    async def nonsense(guest: FakeGuest, stream: VsockStream) -> None:
        await stream.send_all(answer)

    agent = PlayedAgent({FrameType.AWAIT_LISTENER: nonsense, FrameType.WORKLOAD_WAIT: nonsense})
    async with open_vm(boot(FakeEngine(agent))) as running:
        with pytest.raises(ExecEof):
            await running.wait_listening()
        with pytest.raises(ExecEof):
            await running.wait_workload()
        await running.ping()


# --- programs ---


async def test_what_a_program_left_behind_does_not_take_its_outcome_along() -> None:
    async def end_with_an_open_pipe(guest: FakeGuest, stream: VsockStream) -> None:
        await stream.send_all(
            wire.frame(FrameType.STARTED, struct.pack("<I", 7))
            + wire.frame(FrameType.DATA, b"hi\n", wire.StreamId.STDOUT)
            + wire.frame(FrameType.EXIT, struct.pack("<iIQQ", 3, 0, 1_500_000, 77))
        )
        await trio.sleep_forever()

    agent = PlayedAgent({FrameType.EXEC: end_with_an_open_pipe, FrameType.SHUTDOWN: _power_off})
    outcomes: list[ExecOutcome] = []
    async with open_vm(boot(FakeEngine(agent))) as running, trio.open_nursery() as nursery:
        builder = ExecBuilder._create(running.open_exec).argv(["sh", "-c", "sleep 60 & echo hi"])

        async def run(output: Callable[[], Awaitable[ExecOutcome]]) -> None:
            outcomes.append(await output())

        nursery.start_soon(run, builder.output)
        nursery.start_soon(run, partial(builder.output_with_cancel, trio.Event()))
        await wait_all_tasks_blocked()
        assert not outcomes  # the pipe is open
        await running.stop(1)
    for outcome in outcomes:
        assert (outcome.returncode, outcome.stdout, outcome.stderr) == (3, b"hi\n", b"")
    assert len(outcomes) == 2


async def test_programs_run_in_the_real_agent_without_a_machine() -> None:
    engine = FakeEngine(AgentProcess(), raw_channel=True)
    async with open_vm(boot(engine)) as running:
        await running.ping()
        request = exec_request([["sh", "-c", "read line; echo got $line"]], wire.ExecFlags.STDIN)
        async with open_child(running.open_exec(request)) as child:
            assert child.stdin is not None
            await child.stdin.send_all(b"it\n")
            said = b"".join([chunk async for chunk in child.stdout])
            assert (said, await child.wait()) == (b"got it\n", 0)
        pwd = ExecBuilder._create(running.open_exec).argv(["pwd"])
        directory = (await pwd.output()).stdout
        assert (await pwd.cwd("/proc").output()).stdout == b"/proc\n" != directory
        for none in ("", b""):
            assert (await pwd.cwd("/proc").cwd(none).output()).stdout == directory
        with pytest.raises(ValueError, match="null"):
            pwd.cwd("a\0b")


async def test_what_the_guest_does_not_find_is_named_once(tmp_path: Path) -> None:
    engine = FakeEngine(AgentProcess(), raw_channel=True)
    missing = str(tmp_path / "missing")
    long = "/" + "/".join(["ä" * 50] * 5)
    async with open_vm(boot(engine)) as running:
        for path in (missing, long):
            with pytest.raises(FileNotFoundError) as caught:
                await running.client.open_read(path)
            assert str(caught.value) == f"[Errno 2] No such file or directory: {path!r}"
        pwd = ExecBuilder._create(running.open_exec).argv(["pwd"])
        for builder, name in (
            (pwd.argv([missing]), missing),
            (pwd.cwd(missing), missing),
            (pwd.cwd("no/such"), "no/such"),
        ):
            with pytest.raises(FileNotFoundError) as caught:
                await builder.output()
            assert str(caught.value) == f"[Errno 2] No such file or directory: {name!r}"
        for user, said in (("bob", "user 'bob'"), ("0:staffers", "group 'staffers'")):
            with pytest.raises(FileNotFoundError, match=f"the image has no {said}"):
                await pwd.user(user).output()
