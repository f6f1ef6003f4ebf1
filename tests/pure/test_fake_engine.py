"""What the engine for tests does beyond the contract of machines: it lets a test play the guest."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_supermachine.devices.rng import RngDevice
from trio_supermachine.errors import CaptureFailed, NotSupported, SnapshotInvalid, VmExited
from trio_supermachine.hv.base import EngineReport, MachineSpec
from trio_supermachine.hv.fake import FakeEngine, FakeGuest, FakeMachine
from trio_supermachine.snapshots.memory import PagePatch
from trio_supermachine.snapshots.pages import PAGE
from trio_supermachine.vsock.stream import VsockStream

from .test_fake_machine import NOBODY, answers, captured, going_on

SMALL = MachineSpec(memory_mib=1)


async def test_a_guest_dials_prints_and_ends_in_no_time(autojump_clock: MockClock) -> None:
    async def play(guest: FakeGuest) -> None:
        with pytest.raises(ConnectionRefusedError):
            await guest.dial(NOBODY)
        async with await guest.dial(77, b"open") as stream:
            await stream.send_all(b"ing")
        await guest.write_console(b"Kernel panic - not syncing: bored\r\n")
        await trio.sleep(3600)
        guest.end("reset")

    async with FakeEngine(play).open(SMALL) as machine:
        stream = await machine.listen(77).accept()
        with trio.fail_after(7200):
            assert b"".join([chunk async for chunk in stream]) == b"opening"
            end = await machine.wait_exit()
        assert (end.reason, end.detail) == ("reset", "Kernel panic - not syncing: bored")
        with pytest.raises(VmExited, match="bored") as caught:
            await machine.dial(1)
        assert "bored" in caught.value.console


async def test_a_guest_is_played_from_outside_as_well() -> None:
    async with FakeEngine().open(SMALL) as machine:
        listener = machine.guest.listen(5)
        ours = await machine.dial(5)
        theirs = await listener.accept()
        await ours.send_all(b"ping")
        assert await theirs.receive_some() == b"ping"
        machine.guest.end("killed", "signal 9")
        for stream in (ours, theirs):
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        assert (await machine.wait_exit()).detail == "signal 9"
        for call in (lambda: machine.guest.dial(1), lambda: machine.guest.write_console(b"")):
            with pytest.raises(trio.BrokenResourceError):
                await call()


async def test_streams_carry_much_in_both_directions_and_push_back() -> None:
    data = bytes(range(256)) * 8192
    async with FakeEngine().open(SMALL) as machine:
        listener = machine.guest.listen(5)
        ours = await machine.dial(5)
        theirs = await listener.accept()
        with trio.move_on_after(0.05) as full:
            while True:
                await ours.send_all(bytes(65536))
        assert full.cancelled_caught  # nobody reads
        ours.abort()
        ours = await machine.dial(5)
        theirs = await listener.accept()
        received: list[bytes] = []

        async def send(stream: VsockStream) -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async def receive(stream: VsockStream) -> None:
            received.append(b"".join([chunk async for chunk in stream]))

        async with trio.open_nursery() as nursery:
            for stream in (ours, theirs):
                nursery.start_soon(send, stream)
                nursery.start_soon(receive, stream)
        assert received == [data, data]


async def test_what_a_guests_function_raises_comes_out_of_the_block() -> None:
    async def fail(guest: FakeGuest) -> None:
        await guest.write_console(b"about to fail")
        raise KeyError("the test's own")

    with pytest.raises(KeyError, match="own"):
        async with FakeEngine(fail).open(SMALL) as machine:
            end = await machine.wait_exit()
            assert end.reason == "failed"
            await trio.sleep_forever()


async def test_a_guest_whose_machine_is_killed_need_not_tidy_up() -> None:
    async def keep_sending(guest: FakeGuest) -> None:
        stream = await guest.dial(77)
        while True:
            await stream.send_all(b"x")

    async with FakeEngine(keep_sending).open(SMALL) as machine:
        stream = await machine.listen(77).accept()
        await stream.receive_some()


async def test_a_paused_guest_says_nothing(autojump_clock: MockClock) -> None:
    async def tick(guest: FakeGuest) -> None:
        stream = await guest.dial(77)
        while True:
            await trio.sleep(1)
            await guest.write_console(b"tick")
            await stream.send_all(b"tick")

    async with FakeEngine(tick).open(SMALL) as machine:
        stream = await machine.listen(77).accept()
        assert await stream.receive_some() == b"tick"
        await machine.pause()
        assert machine.paused
        said = machine.console.tail()
        with trio.move_on_after(100) as silence:
            await stream.receive_some()
        assert silence.cancelled_caught
        assert machine.console.tail() == said
        await machine.resume()
        assert await stream.receive_some() == b"tick"


def page(text: str) -> bytes:
    return text.encode().ljust(PAGE, b"\0")


async def test_memory_and_state_go_on_in_copies(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with engine.open(SMALL) as machine:
        machine.guest.state = b"some registers"
        for number in (3, 4, 200):
            machine.guest.write_page(number, f"first {number}".encode())
        full, done = await captured(machine, tmp_path / "full")
        assert (done.runs, done.complete) == (((0, 256),), True)
        with pytest.raises(IndexError):
            machine.guest.write_page(256, b"")
    assert full.memory.stat().st_size == 1 << 20
    assert full.memory.stat().st_blocks * 512 <= 64 << 10
    memory = full.memory.read_bytes()
    assert memory[3 * PAGE : 5 * PAGE] == page("first 3") + page("first 4")

    async with engine.open(going_on(SMALL, full)) as copy:
        assert copy.guest.restored
        await copy.resume()
        assert copy.guest.state == b"some registers"
        assert copy.guest.read_page(200) == page("first 200")
        assert copy.guest.read_page(0) == bytes(PAGE)
        copy.guest.write_page(4, b"second")
        copy.guest.write_page(5, b"second")
        diff, done = await captured(copy, tmp_path / "diff", since="full")
        assert (done.runs, done.complete) == (((4, 2),), False)

    patch = PagePatch(diff.memory, ((4, 2),), 4 * PAGE)
    chained = attrs.evolve(diff, memory=full.memory, patches=(patch,))
    async with engine.open(going_on(SMALL, chained)) as copy:
        await copy.resume()
        found = [copy.guest.read_page(number) for number in (3, 4, 5)]
        assert found == [page("first 3"), page("second"), page("second")]
        again, _ = await captured(copy, tmp_path / "again")
    expected = bytearray(memory)
    expected[4 * PAGE : 6 * PAGE] = page("second") * 2
    assert again.memory.read_bytes() == expected


async def test_a_copys_guest_begins_at_the_first_resume(tmp_path: Path) -> None:
    begun: list[bool] = []

    async def play(guest: FakeGuest) -> None:
        begun.append(guest.restored)

    engine = FakeEngine(play)
    async with engine.open(SMALL) as machine:
        await wait_all_tasks_blocked()
        restore, _ = await captured(machine, tmp_path / "full")
    async with engine.open(going_on(SMALL, restore)) as copy:
        await wait_all_tasks_blocked()
        assert begun == [False]
        assert engine.machines == [copy]
        for _ in range(2):
            await copy.resume()
        await wait_all_tasks_blocked()
        assert begun == [False, True]
    assert engine.machines == []


async def test_a_state_of_another_machine_is_refused(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with engine.open(SMALL) as machine:
        restore, _ = await captured(machine, tmp_path / "full")
    async with engine.open(going_on(attrs.evolve(SMALL, vcpus=2), restore)) as copy:
        with pytest.raises(SnapshotInvalid, match="'vcpus': 1"):
            await copy.resume()
    restore.state.write_bytes(b"nonsense")
    async with engine.open(going_on(SMALL, restore)) as copy:
        with pytest.raises(SnapshotInvalid, match="make the snapshot again"):
            await copy.resume()


async def test_a_guest_that_hangs_fails_captures_until_it_recovers(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with FakeEngine().open(SMALL) as machine:
        machine.guest.hang()
        machine.guest.hang()
        with trio.move_on_after(1000) as silence:
            await machine.dial(NOBODY)
        assert silence.cancelled_caught
        before = trio.current_time()
        with pytest.raises(CaptureFailed, match="did not come to rest within 5 s"):
            await captured(machine, tmp_path / "a")
        assert trio.current_time() - before == pytest.approx(5)
        machine.guest.recover()
        await answers(machine)
        await captured(machine, tmp_path / "b")
        machine.guest.hang()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def capture() -> None:
                with pytest.raises(VmExited):
                    await captured(machine, tmp_path / "c")

            await trio.sleep(1)
            machine.kill()


async def test_a_raw_channel_that_breaks_the_protocol_or_ends_fails_the_machine() -> None:
    async def babble(guest: FakeGuest) -> None:
        guest.channel.send(b"\xff" * 100)

    async def leave(guest: FakeGuest) -> None:
        guest.channel.close()

    for play, detail in ((babble, "vsock protocol"), (leave, "channel has ended")):
        async with FakeEngine(play, raw_channel=True).open(SMALL) as machine:
            with trio.fail_after(60):
                end = await machine.wait_exit()
            assert end.reason == "failed"
            assert detail in end.detail


async def test_an_engine_is_as_available_and_as_slow_as_a_test_says(
    autojump_clock: MockClock,
) -> None:
    report = EngineReport(name="slow", available=False, detail="no", remedy="buy one")
    opened: list[MachineSpec] = []

    async def before_open(spec: MachineSpec) -> None:
        opened.append(spec)
        await trio.sleep(60)
        if len(opened) > 1:
            raise VmExited("failed", "no more")

    engine = FakeEngine(name="slow", facts={"host": "this"}, report=report, before_open=before_open)
    assert await engine.probe() is report
    assert await engine.host_facts() == {"host": "this"}
    before = trio.current_time()
    async with engine.open(SMALL) as machine:
        assert isinstance(machine, FakeMachine)
        assert machine.engine == "slow"
    assert trio.current_time() - before == pytest.approx(60)
    with pytest.raises(VmExited, match="no more"):
        async with engine.open(SMALL):
            raise AssertionError("it was opened")
    with pytest.raises(NotSupported, match="no device"):
        async with engine.open(attrs.evolve(SMALL, devices=(RngDevice,))):
            raise AssertionError("it was opened")
