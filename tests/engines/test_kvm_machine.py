"""A KVM machine starts, stands, is captured and ends, whatever its guest does.

The guests are some instructions each and stand for a kernel: these tests run wherever ``/dev/kvm``
opens. What a Linux makes of the machine is told by :mod:`.test_kvm_linux`.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_supermachine.errors import AssetNotFound, ConfigError, SnapshotInvalid, VmExited
from trio_supermachine.hv.base import Captured, Disk, Machine, MachineSpec, Restore
from trio_supermachine.snapshots.memory import PagePatch

from ..support.kvm_guest import (
    CONSOLE_LOOP,
    COUNT,
    KEYBOARD_RESET,
    MEMORY_LOOP,
    MEMORY_MIB,
    PORT_LOOP,
    RESET,
    SHUTDOWN,
    SLEEP,
    SPIN,
    TRIPLE_FAULT,
    remains,
    say,
    tiny_spec,
)
from ..support.qemu_guest import console_until

try:
    from trio_supermachine.hv.kvm.engine import KvmEngine
    from trio_supermachine.hv.kvm.x86.layout import PCI_ECAM
except ImportError:
    pytest.skip("the package was built without the KVM binding", allow_module_level=True)

STUBBORN = {
    "spins": SPIN,
    "sleeps with interrupts off": SLEEP,
    "asks a port without end": PORT_LOOP,
    "asks a device without end": MEMORY_LOOP,
    "floods the console": CONSOLE_LOOP,
}

stubborn = pytest.mark.parametrize("code", STUBBORN.values(), ids=STUBBORN)


@pytest.fixture(autouse=True)
def no_machine_is_left() -> None:
    assert remains() == []


@asynccontextmanager
async def opened(spec: MachineSpec) -> AsyncIterator[Machine]:
    """A machine that is open, in a test that gives up; nothing of it remains."""
    with trio.fail_after(60):
        async with KvmEngine().open(spec) as machine:
            yield machine
    assert remains() == []


def nothing_to_do() -> AbstractAsyncContextManager[None]:
    return nullcontext()


async def captured(
    machine: Machine, directory: Path, since: str | None = None
) -> tuple[Restore, Captured]:
    """Capture it, and give what to go on from."""
    await trio.Path(directory).mkdir()
    state, memory = directory / "state", directory / "memory"
    done = await machine.capture(state, memory, at_rest=nothing_to_do(), since=since)
    return Restore(identity=directory.name, state=state, memory=memory), done


def going_on(spec: MachineSpec, restore: Restore) -> MachineSpec:
    return attrs.evolve(spec, kernel=None, initramfs=None, restore=restore)


async def goes_on(machine: Machine) -> None:
    """Wait until a guest that counts has come round."""
    reader = aiter(machine.console)
    seen = len(machine.console.tail(1 << 20))
    while len(machine.console.tail(1 << 20)) < seen + 20:
        await anext(reader)


# --- ends ---


@pytest.mark.parametrize(
    ("code", "reason", "detail"),
    [
        (SHUTDOWN, "shutdown", ""),
        (RESET, "reset", ""),
        (KEYBOARD_RESET, "reset", ""),
        (TRIPLE_FAULT, "reset", "triple fault"),
    ],
    ids=["ACPI shutdown", "ACPI reset", "keyboard controller", "triple fault"],
)
async def test_how_a_guest_ends_is_told_with_its_last_words(
    tmp_path: Path, code: bytes, reason: str, detail: str
) -> None:
    async with opened(tiny_spec(tmp_path, say(b"last words") + code)) as machine:
        end = await machine.wait_exit()
        assert (end.reason, end.detail) == (reason, detail)
        assert machine.console.tail() == b"last words"
        assert b"".join([chunk async for chunk in machine.console]) == b"last words"
        machine.kill()
        assert await machine.wait_exit() is end
        for operation in (machine.pause, machine.resume, lambda: machine.dial(1)):
            with pytest.raises(VmExited, match="last words") as caught:
                await operation()
            assert caught.value.reason == reason
        with pytest.raises(VmExited):
            await captured(machine, tmp_path / "late")


@stubborn
async def test_a_stubborn_guest_stands_goes_on_and_is_killed_at_once(
    tmp_path: Path, code: bytes
) -> None:
    for vcpus in (1, 2, 4):
        directory = tmp_path / str(vcpus)
        directory.mkdir()
        async with opened(tiny_spec(directory, code, vcpus=vcpus)) as machine:
            for _ in range(3):
                await machine.pause()
                await machine.pause()
                await machine.resume()
                await machine.resume()
            await machine.pause()
            machine.kill()
            machine.kill()
            assert (await machine.wait_exit()).reason == "stopped"


@stubborn
async def test_leaving_the_block_ends_a_stubborn_guest(tmp_path: Path, code: bytes) -> None:
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        async with opened(tiny_spec(tmp_path, say(b"up") + code, vcpus=2)) as machine:
            await console_until(machine, b"up")
            raise error
    assert caught.value is error
    assert remains() == []


def load_eax(address: int) -> bytes:
    return b"\xa1" + address.to_bytes(4, "little")


def store_eax(address: int) -> bytes:
    return b"\xa3" + address.to_bytes(4, "little")


async def test_a_guest_may_put_one_device_on_top_of_another(tmp_path: Path) -> None:
    """KVM has room for one doorbell at a place, and never hears of the other."""
    channel, rng = PCI_ECAM + (1 << 15), PCI_ECAM + (1 << 15) + (1 << 12)
    decode_memory = bytes.fromhex("b8 06 00 00 00")  # mov eax, 6
    code = b""
    for bar in (0x10, 0x14):
        code += load_eax(channel + bar) + store_eax(rng + bar)
    for function in (channel, rng):
        code += decode_memory + store_eax(function + 4)
    async with opened(tiny_spec(tmp_path, code + say(b"on") + SHUTDOWN)) as machine:
        assert (await machine.wait_exit()).reason == "shutdown"
        assert machine.console.tail() == b"on"


async def test_what_waits_for_a_machine_is_told_of_its_end(tmp_path: Path) -> None:
    told: list[str] = []
    async with opened(tiny_spec(tmp_path, SPIN)) as machine:
        listener = machine.listen(7)
        with pytest.raises(OSError, match="already has a listener"):
            machine.listen(7)

        async def accept() -> None:
            with pytest.raises(VmExited) as caught:
                await listener.accept()
            told.append(caught.value.reason)

        async def dial() -> None:
            with pytest.raises(VmExited) as caught:
                await machine.dial(7)
            told.append(caught.value.reason)

        async def wait() -> None:
            told.append((await machine.wait_exit()).reason)

        async with trio.open_nursery() as nursery:
            for task in (accept, dial, wait):
                nursery.start_soon(task)
            await wait_all_tasks_blocked()
            machine.kill()
    assert told == ["stopped"] * 3


async def test_a_paused_guest_stands_still(tmp_path: Path) -> None:
    async with opened(tiny_spec(tmp_path, COUNT)) as machine:
        await console_until(machine, b"abc")
        await machine.pause()
        await wait_all_tasks_blocked()  # what was on its way has come
        before = machine.console.tail(1 << 20)
        await wait_all_tasks_blocked(0.1)
        assert machine.console.tail(1 << 20) == before
        await machine.resume()
        await goes_on(machine)


async def test_several_machines_at_once_are_apart(tmp_path: Path) -> None:
    texts = [b"machine %d" % number for number in range(4)]

    async def one(text: bytes) -> None:
        directory = tmp_path / text.decode()
        directory.mkdir()
        async with KvmEngine().open(tiny_spec(directory, say(text) + SHUTDOWN)) as machine:
            await machine.wait_exit()
            assert machine.console.tail() == text

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for text in texts:
                nursery.start_soon(one, text)
    assert remains() == []


# --- machines that cannot be made ---


async def refusal(spec: MachineSpec, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        async with KvmEngine().open(spec):
            raise AssertionError("it was opened")
    assert remains() == []
    return str(caught.value)


async def test_a_machine_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, SPIN)
    nonsense, missing = tmp_path / "nonsense", tmp_path / "missing"
    nonsense.write_bytes(b"nonsense" * 100)
    disk = Disk(path=missing)

    def changed(**changes: object) -> MachineSpec:
        return attrs.evolve(spec, **changes)  # type: ignore[arg-type]

    assert "nonsense" in await refusal(changed(kernel=nonsense), AssetNotFound)
    assert "kernel" in await refusal(changed(kernel=None), ConfigError)
    for missed in (changed(kernel=missing), changed(initramfs=missing), changed(disks=(disk,))):
        assert str(missing) in await refusal(missed, FileNotFoundError)
    assert "memory" in (await refusal(changed(memory_mib=1), ConfigError)).lower()
    await refusal(changed(memory_mib=1 << 36), VmExited)
    assert "233 disks" in await refusal(changed(disks=(disk,) * 233), ConfigError)
    assert "vCPU" in await refusal(changed(vcpus=200), ConfigError)


# --- snapshots ---


async def test_a_machine_goes_on_from_a_capture_as_often_as_one_likes(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, COUNT, vcpus=2)
    async with opened(spec) as machine:
        await console_until(machine, b"abc")
        restore, done = await captured(machine, tmp_path / "first")
        assert done.complete
        await goes_on(machine)
    for _ in range(3):
        async with opened(going_on(spec, restore)) as copy:
            await wait_all_tasks_blocked()
            assert copy.console.tail() == b""  # it stands
            await copy.resume()
            said = await console_until(copy, b"abc")
            assert said[:2] in b"abcdefghijklmnopabc"
    assert restore.memory.stat().st_size == MEMORY_MIB << 20
    assert restore.memory.stat().st_blocks * 512 < 1 << 20


async def test_only_what_changed_since_a_restore_is_captured(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, COUNT)
    async with opened(spec) as machine:
        await console_until(machine, b"abc")
        restore, _ = await captured(machine, tmp_path / "full")
    patches: tuple[PagePatch, ...] = ()
    for name in ("first", "second", "third"):
        current = attrs.evolve(restore, identity=name, patches=patches)
        async with opened(going_on(spec, current)) as machine:
            await machine.resume()
            await goes_on(machine)
            found, done = await captured(machine, tmp_path / name, since=name)
        assert not done.complete
        assert 0 < sum(count for _, count in done.runs) < 100
        patch = tmp_path / f"{name}.patch"
        with patch.open("wb") as target, found.memory.open("rb") as source:
            for first, count in done.runs:
                source.seek(first * 4096)
                target.write(source.read(count * 4096))
        patches = (*patches, PagePatch(file=patch, offset=0, runs=done.runs))
        restore = attrs.evolve(restore, state=found.state)


async def test_a_capture_of_a_paused_machine_leaves_it_paused(tmp_path: Path) -> None:
    async with opened(tiny_spec(tmp_path, COUNT)) as machine:
        await console_until(machine, b"abc")
        await machine.pause()
        await captured(machine, tmp_path / "paused")
        await wait_all_tasks_blocked()
        before = machine.console.tail(1 << 20)
        await wait_all_tasks_blocked(0.1)
        assert machine.console.tail(1 << 20) == before
        await machine.resume()
        await goes_on(machine)


async def test_resuming_in_a_capture_counts_when_it_is_done(tmp_path: Path) -> None:
    async with opened(tiny_spec(tmp_path, COUNT)) as machine:
        await machine.pause()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(captured, machine, tmp_path / "snap")
            nursery.start_soon(machine.resume)
        await goes_on(machine)


# --- cancellation ---


class _StepCanceller(trio.abc.Instrument):
    """Cancels ``scope`` after a number of steps of one task."""

    def __init__(self, steps: int, scope: trio.CancelScope) -> None:
        self._task = trio.lowlevel.current_task()
        self.left = steps
        self._scope = scope

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self.left -= 1
            if self.left == 0:
                self._scope.cancel()


async def _cancelled_after(steps: int, work: Callable[[], AsyncIterator[None]]) -> bool:
    """Cancel ``work`` after that many steps; whether it had not ended by then."""
    with trio.fail_after(60), trio.CancelScope() as scope:
        canceller = _StepCanceller(steps, scope)
        trio.lowlevel.add_instrument(canceller)
        try:
            async for _ in work():
                pass
        finally:
            trio.lowlevel.remove_instrument(canceller)
    return scope.cancelled_caught


async def test_cancelling_a_machine_anywhere_leaves_nothing(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, COUNT, vcpus=2)
    async with opened(spec) as machine:
        restore, _ = await captured(machine, tmp_path / "snap")

    one = spec

    async def life() -> AsyncIterator[None]:
        async with KvmEngine().open(one) as machine:
            await machine.resume()
            await goes_on(machine)
            await machine.pause()
            yield

    for one in (spec, going_on(spec, restore)):  # noqa: B007
        steps = 1
        while await _cancelled_after(steps, life):
            assert remains() == []
            steps += 1
        assert steps > 5


@pytest.mark.parametrize("code", [COUNT, SPIN, SLEEP], ids=["counts", "spins", "sleeps"])
async def test_cancelling_a_capture_or_a_pause_anywhere_changes_nothing(
    tmp_path: Path, code: bytes
) -> None:
    directory = tmp_path / "machine"
    directory.mkdir()

    async with opened(tiny_spec(directory, code, vcpus=4)) as machine:

        async def capture() -> AsyncIterator[None]:
            await captured(machine, tmp_path / "snap")
            yield

        async def stop_and_go() -> AsyncIterator[None]:
            await machine.pause()
            yield
            await machine.resume()

        for work in (capture, stop_and_go):
            steps = 1
            while await _cancelled_after(steps, work):
                if (tmp_path / "snap").exists():
                    for file in (tmp_path / "snap").iterdir():
                        file.unlink()
                    (tmp_path / "snap").rmdir()
                await machine.resume()
                if code is COUNT:
                    await goes_on(machine)
                steps += 1
            assert steps > 1


async def test_a_machine_may_end_at_any_moment_of_a_capture(tmp_path: Path) -> None:
    rng = random.Random(5)
    spec = tiny_spec(tmp_path, COUNT, vcpus=2)
    for number in range(30):

        async def kill(machine: Machine, after: int) -> None:
            for _ in range(after):
                await trio.lowlevel.checkpoint()
            machine.kill()

        async with opened(spec) as machine, trio.open_nursery() as nursery:
            nursery.start_soon(kill, machine, rng.randrange(60))
            try:
                await captured(machine, tmp_path / str(number))
            except VmExited:
                pass
            assert (await machine.wait_exit()).reason == "stopped"


# --- damage ---


async def test_damaged_state_is_refused_or_of_a_guest_that_goes_wrong(tmp_path: Path) -> None:
    """Checksums have been found right: what is damaged here was so when it was written."""
    rng = random.Random(6)
    spec = tiny_spec(tmp_path, COUNT)
    async with opened(spec) as machine:
        await console_until(machine, b"abc")
        restore, _ = await captured(machine, tmp_path / "snap")
    good = restore.state.read_bytes()
    described, _, binary = good.partition(b"\n")
    values = [b"null", b"[]", b"{}", b"-1", b'"x"', b"1e999", b"184467440737095516160", b"true"]
    damaged = [good[:size] for size in (0, 1, len(described), len(described) + 1, len(good) - 1)]
    damaged += [
        good + b"\0",
        b"[" * 100_000,
        b"5\n" + binary,
        b'{"serial": 5, "pci": 5}\n' + binary,
    ]
    damaged += [json.dumps(one).encode() + b"\n" + binary for one in _without_a_part(described)]
    for _ in range(150):
        changed = bytearray(good)
        for _ in range(rng.choice((1, 1, 4))):
            area = len(described) if rng.random() < 0.5 else len(good)
            changed[rng.randrange(area)] ^= 1 << rng.randrange(8)
        damaged.append(bytes(changed))
    damaged += [
        json.dumps(one).encode().replace(b'"DAMAGED"', rng.choice(values)) + b"\n" + binary
        for one in _with_damage(described)
    ]
    refused = 0
    for state in damaged:
        restore.state.write_bytes(state)
        try:
            with trio.fail_after(60):
                async with KvmEngine().open(going_on(spec, restore)) as machine:
                    await machine.resume()
                    machine.kill()
        except SnapshotInvalid as exc:
            assert str(restore.state) in str(exc)  # noqa: PT017
            refused += 1
        except VmExited:
            pass  # it ran, and fell over its state
        assert remains() == []
    assert refused > len(damaged) // 3


def _leaves(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    if isinstance(value, dict):
        found = [leaf for key, inner in value.items() for leaf in _leaves(inner, (*path, key))]
    elif isinstance(value, list):
        found = [leaf for at, inner in enumerate(value) for leaf in _leaves(inner, (*path, at))]
    else:
        found = []
    return [*found, path] if path else found


def _changed(described: bytes, path: tuple[str | int, ...], *, gone: bool) -> object:
    whole = json.loads(described)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    if gone:
        del inner[path[-1]]
    else:
        inner[path[-1]] = "DAMAGED"
    return whole


def _sample(described: bytes) -> list[tuple[str | int, ...]]:
    leaves = _leaves(json.loads(described))
    return random.Random(7).sample(leaves, min(150, len(leaves)))


def _without_a_part(described: bytes) -> list[object]:
    return [_changed(described, path, gone=True) for path in _sample(described)]


def _with_damage(described: bytes) -> list[object]:
    return [_changed(described, path, gone=False) for path in _sample(described)]


async def test_memory_of_another_size_or_that_is_gone_is_refused(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, COUNT)
    async with opened(spec) as machine:
        restore, _ = await captured(machine, tmp_path / "snap")
    again = going_on(spec, restore)
    beyond = PagePatch(file=restore.memory, offset=0, runs=((MEMORY_MIB << 8, 1),))
    await refusal(
        attrs.evolve(again, restore=attrs.evolve(restore, patches=(beyond,))), SnapshotInvalid
    )
    os.truncate(restore.memory, 1 << 20)
    await refusal(again, SnapshotInvalid)
    restore.memory.unlink()
    await refusal(again, FileNotFoundError)
