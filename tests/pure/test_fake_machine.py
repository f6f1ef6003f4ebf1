"""What every machine does, as claims that any engine can run; here on the one without a guest.

``tests/engines/test_machine_contract.py`` runs :class:`MachineContract` on a real engine.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_supermachine.errors import VmExited
from trio_supermachine.hv.base import Captured, Disk, Engine, Machine, MachineSpec, Restore
from trio_supermachine.hv.fake import FakeEngine, FakeGuest
from trio_supermachine.vsock.stream import VsockStream

from ..support.processes import open_files

LIFELINE = 1029
NOBODY = 9  # a port that nothing listens on


class StepCanceller(trio.abc.Instrument):
    """Cancels a scope after a number of steps of the current task.

    :ivar left: the steps that the task has not made; positive if it came to its end before.
    """

    def __init__(self, steps: int, scope: trio.CancelScope) -> None:
        self.left = steps
        self._task = trio.lowlevel.current_task()
        self._scope = scope

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self.left -= 1
            if self.left == 0:
                self._scope.cancel()

    def __enter__(self) -> StepCanceller:
        trio.lowlevel.add_instrument(self)
        return self

    def __exit__(self, *_: object) -> None:
        trio.lowlevel.remove_instrument(self)


async def captured(
    machine: Machine,
    directory: Path,
    *,
    since: str | None = None,
    at_rest: AbstractAsyncContextManager[None] | None = None,
) -> tuple[Restore, Captured]:
    """Capture a machine into a new directory; give what to go on from, too."""
    await trio.Path(directory).mkdir()
    state, memory = directory / "state", directory / "memory"
    done = await machine.capture(state, memory, at_rest=at_rest or nullcontext(), since=since)
    return Restore(identity=directory.name, state=state, memory=memory), done


def going_on(spec: MachineSpec, restore: Restore) -> MachineSpec:
    return attrs.evolve(spec, kernel=None, initramfs=None, restore=restore)


async def answers(machine: Machine) -> None:
    """Check that the guest runs: it refuses what nobody listens to."""
    with trio.fail_after(60), pytest.raises(ConnectionRefusedError):
        await machine.dial(NOBODY)


class MachineContract:
    """Claims about any engine. The fixtures `engine` and `spec` are those of a subclass.

    The guest dials :data:`LIFELINE`, says something, and powers off when this stream ends and
    nobody listens there.

    :cvar cancelled_steps: the steps of a capture at which it is cancelled.
    """

    cancelled_steps: Iterable[int]

    async def lifeline(self, machine: Machine) -> VsockStream:
        """Let the guest run, wait until it is up, and greet it."""
        listener = machine.listen(LIFELINE)
        await machine.resume()
        with trio.fail_after(60):
            stream = await listener.accept()
            await listener.aclose()
            assert await stream.receive_some()
            await self.greet(stream)
        return stream

    async def greet(self, stream: VsockStream) -> None:
        """Say on the lifeline what the guest waits for."""

    async def test_it_talks_with_its_guest_and_hears_of_its_end(
        self, engine: Engine, spec: MachineSpec, tmp_path: Path
    ) -> None:
        async with engine.open(spec) as machine:
            assert machine.engine == engine.name
            other = machine.listen(77)
            with pytest.raises(OSError, match="already has a listener") as caught:
                machine.listen(77)
            assert caught.value.errno == errno.EADDRINUSE
            stream = await self.lifeline(machine)
            await answers(machine)
            refused = await machine.dial(NOBODY, b"an opening")
            with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
                await refused.receive_some()
            await refused.aclose()
            await stream.aclose()
            with trio.fail_after(60):
                end = await machine.wait_exit()
            assert end.reason == "shutdown"
            machine.kill()
            assert await machine.wait_exit() is end
            calls: list[Callable[[], Awaitable[object]]] = [
                machine.pause,
                machine.resume,
                other.accept,
                lambda: machine.dial(NOBODY),
                lambda: captured(machine, tmp_path / "late"),
            ]
            for call in calls:
                with pytest.raises(VmExited) as ended:
                    await call()
                assert ended.value.reason == "shutdown"
            async for _ in machine.console:
                pass  # it has an end

    async def test_a_kill_is_told_to_everything_that_waits(
        self, engine: Engine, spec: MachineSpec
    ) -> None:
        told: list[object] = []
        async with engine.open(spec) as machine:
            stream = await self.lifeline(machine)
            listener = machine.listen(77)
            await machine.pause()  # so that a dial waits

            async def accept() -> None:
                with pytest.raises(VmExited) as caught:
                    await listener.accept()
                told.append(caught.value.reason)

            async def dial() -> None:
                with pytest.raises(VmExited) as caught:
                    await machine.dial(NOBODY)
                told.append(caught.value.reason)

            async def receive() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
                told.append("broken")

            async def read() -> None:
                async for _ in machine.console:
                    pass
                told.append("end of console")

            async def wait() -> None:
                told.append(await machine.wait_exit())

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for task in (accept, accept, dial, receive, read, read, wait, wait):
                        nursery.start_soon(task)
                    await wait_all_tasks_blocked(0.01)
                    assert not told
                    machine.kill()
                    machine.kill("shutdown")
                end = await machine.wait_exit()
            assert end.reason == "stopped"
            assert told.count(end) == 2
            assert told.count("broken") == 1
            assert told.count("end of console") == 2
            assert told.count("stopped") == 3
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"late")
            await stream.aclose()

    async def test_a_kill_is_told_by_the_reason_that_it_gives(
        self, engine: Engine, spec: MachineSpec
    ) -> None:
        async with engine.open(spec) as machine:
            machine.kill("shutdown")
            assert (await machine.wait_exit()).reason == "shutdown"

    async def test_exceptions_of_the_body_come_out_as_themselves(
        self, engine: Engine, spec: MachineSpec
    ) -> None:
        error = KeyError("mine")
        with pytest.raises(KeyError) as caught:
            async with engine.open(spec):
                raise error
        assert caught.value is error
        assert error.__context__ is None
        with pytest.raises(ExceptionGroup) as group:
            async with engine.open(spec):
                raise ExceptionGroup("mine", [error])
        assert group.value.exceptions == (error,)

    async def test_its_own_end_does_not_end_the_block(
        self, engine: Engine, spec: MachineSpec
    ) -> None:
        async with engine.open(spec) as machine:
            machine.kill()
            await machine.wait_exit()
            await trio.lowlevel.checkpoint()
            done = True
        assert done

    async def test_cancelling_the_start_anywhere_leaves_nothing(
        self, engine: Engine, spec: MachineSpec
    ) -> None:
        async with engine.open(spec):
            pass  # what is found once and remembered is found now
        for steps in range(1, 1000):
            before = open_files().keys()
            left = 0
            with trio.CancelScope() as scope, StepCanceller(steps, scope) as canceller:
                async with engine.open(spec) as machine:
                    left = canceller.left
                    scope.cancel()
                    await machine.wait_exit()
            assert scope.cancelled_caught
            assert open_files().keys() == before
            if left > 0:
                assert steps > 1
                return
        raise AssertionError("the start never came to its end")

    async def test_calls_still_reach_the_guest_while_the_owner_is_cancelled(
        self, engine: Engine, spec: MachineSpec
    ) -> None:
        with trio.CancelScope() as outer:
            async with engine.open(spec) as machine:
                stream = await self.lifeline(machine)
                outer.cancel()
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await answers(machine)
                        await stream.aclose()
        assert outer.cancelled_caught

    async def test_each_call_is_a_checkpoint_and_does_nothing_when_cancelled(
        self, engine: Engine, spec: MachineSpec
    ) -> None:
        async with engine.open(spec) as machine:
            listener = machine.listen(77)
            stream = await self.lifeline(machine)
            calls: list[Callable[[], Awaitable[object]]] = [
                listener.accept,
                machine.wait_exit,
                lambda: machine.dial(NOBODY),
                lambda: anext(aiter(machine.console)),
            ]
            for call in calls:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await call()
                assert scope.cancelled_caught
            await answers(machine)
            await stream.aclose()

    async def test_pausing_and_resuming_are_idempotent_and_a_dial_waits_in_between(
        self, engine: Engine, spec: MachineSpec
    ) -> None:
        async with engine.open(spec) as machine:
            stream = await self.lifeline(machine)
            for _ in range(2):
                await machine.pause()
                await machine.pause()
                with trio.move_on_after(0.05) as silence:
                    await machine.dial(NOBODY)
                assert silence.cancelled_caught
                await machine.resume()
                await machine.resume()
                await answers(machine)
            await stream.aclose()

    async def test_what_is_captured_goes_on_as_often_as_one_likes(
        self, engine: Engine, spec: MachineSpec, tmp_path: Path
    ) -> None:
        seen: list[str] = []

        @asynccontextmanager
        async def at_rest(machine: Machine) -> AsyncIterator[None]:
            await answers(machine)
            seen.append("in")
            yield
            await answers(machine)
            seen.append("out")

        async with engine.open(spec) as machine:
            stream = await self.lifeline(machine)
            restore, done = await captured(machine, tmp_path / "a", at_rest=at_rest(machine))
            assert seen == ["in", "out"]
            assert done.complete
            assert 0 <= done.standstill < 60
            size = spec.memory_mib << 20
            assert restore.memory.stat().st_size == size
            assert restore.memory.stat().st_blocks * 512 < size
            with pytest.raises(FileExistsError):
                await machine.capture(restore.state, tmp_path / "m", at_rest=nullcontext())
            await answers(machine)
            await stream.aclose()
        for name in ("b", "c"):
            async with engine.open(going_on(spec, restore)) as copy:
                with trio.move_on_after(0.05) as silence:
                    await copy.dial(NOBODY)
                assert silence.cancelled_caught  # it stands still
                await self.lifeline(copy)
                await answers(copy)
                _, rest = await captured(copy, tmp_path / name, since=restore.identity)
                assert not rest.complete
                pages = [page for first, count in rest.runs for page in (first, first + count)]
                assert pages == sorted(pages)
                _, whole = await captured(copy, tmp_path / (name + "+"), since="another")
                assert whole.complete

    async def test_a_capture_that_is_cancelled_leaves_a_machine_that_goes_on(
        self, engine: Engine, spec: MachineSpec, tmp_path: Path
    ) -> None:
        async with engine.open(spec) as machine:
            stream = await self.lifeline(machine)
            done = False
            for steps in self.cancelled_steps:
                inside = 0

                @asynccontextmanager
                async def at_rest() -> AsyncIterator[None]:
                    nonlocal inside
                    inside += 1
                    try:
                        yield
                    finally:
                        inside -= 1

                with trio.CancelScope() as scope, StepCanceller(steps, scope) as canceller:
                    await captured(machine, tmp_path / str(steps), at_rest=at_rest())
                assert inside == 0
                await answers(machine)
                done = canceller.left > 0 and not scope.cancelled_caught
                if done:
                    break
            if not done:
                await captured(machine, tmp_path / "last")
            await answers(machine)
            await stream.aclose()

    async def test_a_capture_whose_block_fails_fails_with_that(
        self, engine: Engine, spec: MachineSpec, tmp_path: Path
    ) -> None:
        @asynccontextmanager
        async def at_rest(*, before: bool) -> AsyncIterator[None]:
            if before:
                raise KeyError("before")
            yield
            raise KeyError("behind")

        async with engine.open(spec) as machine:
            stream = await self.lifeline(machine)
            for before in (True, False):
                with pytest.raises(KeyError, match="before" if before else "behind"):
                    await captured(machine, tmp_path / str(before), at_rest=at_rest(before=before))
                await answers(machine)
            await stream.aclose()

    async def test_a_missing_disk_is_named(
        self, engine: Engine, spec: MachineSpec, tmp_path: Path
    ) -> None:
        disks = (*spec.disks, Disk(path=tmp_path / "missing"))
        with pytest.raises(FileNotFoundError) as caught:
            async with engine.open(attrs.evolve(spec, disks=disks)):
                raise AssertionError("it was opened")
        assert Path(caught.value.filename) == tmp_path / "missing"

    async def test_the_facts_about_a_host_stay_the_same(self, engine: Engine) -> None:
        report = await engine.probe()
        assert (report.name, report.available) == (engine.name, True)
        facts = await engine.host_facts()
        assert facts
        assert dict(facts) == dict(await engine.host_facts())


async def agent_without_greeting(guest: FakeGuest) -> None:
    """Play the guest of the contract."""
    async with await guest.dial(LIFELINE) as stream:
        await stream.send_all(b"hello")
        while await stream.receive_some():
            pass
    guest.end("shutdown")


class TestFakeMachine(MachineContract):
    cancelled_steps = range(1, 1000)

    @pytest.fixture
    def engine(self) -> Engine:
        return FakeEngine(agent_without_greeting)

    @pytest.fixture
    def spec(self) -> MachineSpec:
        return MachineSpec(memory_mib=1)
