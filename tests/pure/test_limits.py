"""The process-wide limits: in order, never above, across threads and runs, and by scope."""

from __future__ import annotations

import math
import threading
from collections import deque
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine import AdmissionRefused, ConfigError
from trio_supermachine.host.memory import usable_memory_mib
from trio_supermachine.vm.limits import (
    MemoryAdmission,
    SpawnConcurrency,
    memory_admission,
    refuse_impossible,
)


def admission(limit: float) -> MemoryAdmission:
    made = MemoryAdmission()
    made.limit = limit
    return made


class Holder:
    """A task that asks for memory and holds it until told."""

    def __init__(self, gate: MemoryAdmission, mib: int) -> None:
        self.gate = gate
        self.mib = mib
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.state = "waiting"

    async def run(self) -> None:
        with self.scope:
            try:
                async with self.gate.admit(self.mib):
                    self.state = "holding"
                    await self.done.wait()
            except AdmissionRefused:
                self.state = "refused"
                return
        self.state = "cancelled" if self.scope.cancelled_caught else "left"


async def test_what_fits_is_admitted_and_given_back() -> None:
    gate = admission(100)
    async with gate.admit(60):
        async with gate.admit(40):
            now = gate.statistics()
            assert (now.limit, now.in_use, now.holders, now.waiting) == (100, 100, 2, 0)
        assert gate.statistics().in_use == 60
    assert gate.statistics().holders == 0


async def test_what_can_never_fit_is_refused_at_once_with_the_numbers() -> None:
    gate = admission(100)
    with pytest.raises(AdmissionRefused) as caught:
        async with gate.admit(101):
            pytest.fail("admitted")
    assert (caught.value.requested_mib, caught.value.limit_mib) == (101, 100)


def test_what_can_never_fit_is_known_before_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_admission, "limit", 100)
    refuse_impossible(100)
    with pytest.raises(AdmissionRefused) as caught:
        refuse_impossible(101)
    assert (caught.value.requested_mib, caught.value.limit_mib) == (101, 100)
    assert memory_admission.statistics().in_use == 0


async def test_admission_is_in_order_so_that_a_large_request_is_served(
    nursery: trio.Nursery,
) -> None:
    gate = admission(100)
    first, large, small = (Holder(gate, mib) for mib in (60, 80, 10))
    for holder in (first, large, small):
        nursery.start_soon(holder.run)
        await trio.testing.wait_all_tasks_blocked()
    assert [h.state for h in (first, large, small)] == ["holding", "waiting", "waiting"]
    first.done.set()
    await trio.testing.wait_all_tasks_blocked()
    assert [h.state for h in (large, small)] == ["holding", "holding"]
    nursery.cancel_scope.cancel()


async def test_a_cancelled_waiter_lets_those_behind_it_in(nursery: trio.Nursery) -> None:
    gate = admission(100)
    first, large, small = (Holder(gate, mib) for mib in (60, 80, 10))
    for holder in (first, large, small):
        nursery.start_soon(holder.run)
        await trio.testing.wait_all_tasks_blocked()
    large.scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert (large.state, small.state) == ("cancelled", "holding")
    assert gate.statistics().in_use == 70
    nursery.cancel_scope.cancel()


async def test_lowering_the_limit_ends_nobody_and_refuses_who_can_never_fit(
    nursery: trio.Nursery,
) -> None:
    gate = admission(100)
    first, large, small = (Holder(gate, mib) for mib in (90, 80, 20))
    for holder in (first, large, small):
        nursery.start_soon(holder.run)
        await trio.testing.wait_all_tasks_blocked()
    gate.limit = 50
    await trio.testing.wait_all_tasks_blocked()
    assert [h.state for h in (first, large, small)] == ["holding", "refused", "waiting"]
    first.done.set()
    await trio.testing.wait_all_tasks_blocked()
    assert small.state == "holding"
    nursery.cancel_scope.cancel()


async def test_raising_the_limit_wakes_those_who_wait(nursery: trio.Nursery) -> None:
    gate = admission(10)
    first, second = Holder(gate, 10), Holder(gate, 10)
    nursery.start_soon(first.run)
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(second.run)
    await trio.testing.wait_all_tasks_blocked()
    gate.limit = math.inf
    await trio.testing.wait_all_tasks_blocked()
    assert second.state == "holding"
    async with gate.admit(1 << 40):
        assert gate.statistics().holders == 3
    nursery.cancel_scope.cancel()


async def test_a_cancelled_scope_admits_nobody() -> None:
    gate = admission(100)
    with trio.CancelScope() as scope:
        scope.cancel()
        async with gate.admit(1):
            pytest.fail("admitted")
    assert gate.statistics().holders == 0


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, math.nan, "10", None])
async def test_a_bad_value_is_refused_where_it_is_written(bad: object) -> None:
    gate = admission(100)
    with pytest.raises(ConfigError):
        gate.limit = bad  # type: ignore[assignment]
    with pytest.raises(ConfigError):
        SpawnConcurrency().limit = bad  # type: ignore[assignment]
    with pytest.raises(ConfigError):
        async with gate.admit(bad):  # type: ignore[arg-type]
            pytest.fail("admitted")


async def test_starts_in_flight_never_exceed_the_limit(nursery: trio.Nursery) -> None:
    gate = SpawnConcurrency()
    gate.limit = 2
    done = trio.Event()

    async def start() -> None:
        async with gate:
            await done.wait()

    for _ in range(5):
        nursery.start_soon(start)
    await trio.testing.wait_all_tasks_blocked()
    assert (gate.statistics().in_use, gate.statistics().waiting) == (2, 3)
    gate.limit = 4
    await trio.testing.wait_all_tasks_blocked()
    assert (gate.statistics().in_use, gate.statistics().waiting) == (4, 1)
    done.set()
    await trio.testing.wait_all_tasks_blocked()
    assert (gate.statistics().in_use, gate.statistics().waiting) == (0, 0)


def test_it_holds_across_threads_and_across_runs() -> None:
    gate = admission(30)
    most = 0
    inside = 0
    lock = threading.Lock()

    async def worker() -> None:
        nonlocal most, inside
        for _ in range(20):
            async with gate.admit(10):
                with lock:
                    inside += 1
                    most = max(most, inside)
                await trio.lowlevel.checkpoint()
                with lock:
                    inside -= 1

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(worker)

    for _ in range(2):
        threads = [threading.Thread(target=trio.run, args=(run,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert gate.statistics().holders == gate.statistics().waiting == 0
    assert 1 <= most <= 3


def test_a_waiter_in_one_thread_is_woken_by_a_release_in_another() -> None:
    gate = admission(10)
    held, asked = threading.Event(), threading.Event()

    async def hold() -> None:
        async with gate.admit(10):
            held.set()
            await trio.to_thread.run_sync(asked.wait)

    async def ask() -> None:
        await trio.to_thread.run_sync(held.wait)
        async with trio.open_nursery() as nursery:
            holder = Holder(gate, 10)
            nursery.start_soon(holder.run)
            while gate.statistics().waiting == 0:
                await trio.lowlevel.checkpoint()
            asked.set()
            holder.done.set()
        assert holder.state == "left"

    other = threading.Thread(target=trio.run, args=(hold,))
    other.start()
    trio.run(ask)
    other.join()
    assert gate.statistics().holders == 0


class Model:
    """What the gate should do, written in the plainest way."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.queue: deque[int] = deque()
        self.states: list[str] = []
        self.sizes: list[int] = []

    def used(self) -> int:
        return sum(m for m, s in zip(self.sizes, self.states, strict=True) if s == "holding")

    def settle(self) -> None:
        for number in list(self.queue):
            if self.sizes[number] > self.limit:
                self.states[number] = "refused"
                self.queue.remove(number)
        while self.queue and self.used() + self.sizes[self.queue[0]] <= self.limit:
            self.states[self.queue.popleft()] = "holding"

    def ask(self, mib: int) -> None:
        self.sizes.append(mib)
        self.states.append("waiting")
        self.queue.append(len(self.sizes) - 1)

    def leave(self, number: int, how: str) -> None:
        if number in self.queue:
            self.queue.remove(number)
        self.states[number] = how


actions = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 120)),
        st.tuples(st.sampled_from(["leave", "cancel"]), st.integers(0, 20)),
        st.tuples(st.just("limit"), st.integers(1, 120)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(actions)
def test_any_history_ends_as_in_the_model(history: list[tuple[str, int]]) -> None:
    async def run() -> None:
        gate, model = admission(100), Model(100)
        holders: list[Holder] = []
        async with trio.open_nursery() as nursery:
            for action, number in history:
                living = [i for i, s in enumerate(model.states) if s in ("waiting", "holding")]
                if action == "ask":
                    holders.append(Holder(gate, number))
                    nursery.start_soon(holders[-1].run)
                    model.ask(number)
                elif action == "limit":
                    gate.limit = model.limit = number
                elif living:
                    chosen = living[number % len(living)]
                    if action == "cancel":
                        holders[chosen].scope.cancel()
                        model.leave(chosen, "cancelled")
                    elif model.states[chosen] == "holding":
                        holders[chosen].done.set()
                        model.leave(chosen, "left")
                model.settle()
                await trio.testing.wait_all_tasks_blocked()
                assert [holder.state for holder in holders] == model.states
                now = gate.statistics()
                assert (now.in_use, now.waiting) == (model.used(), len(model.queue))
            nursery.cancel_scope.cancel()
        assert gate.statistics().in_use == gate.statistics().waiting == 0

    trio.run(run)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", "MemTotal:        8388608 kB\nMemFree:  1 kB\n")
    return tmp_path / "proc"


def test_the_hosts_memory_counts_without_control_groups(proc: Path, tmp_path: Path) -> None:
    assert usable_memory_mib(proc, tmp_path / "none") == 8192


@pytest.mark.parametrize("own", ["max", str(6 << 30)])
def test_the_lowest_of_nested_groups_counts(proc: Path, tmp_path: Path, own: str) -> None:
    write(proc / "self/cgroup", "0::/slice/unit\n")
    write(tmp_path / "groups/slice/unit/memory.max", own + "\n")
    write(tmp_path / "groups/slice/memory.max", f"{2 << 30}\n")
    assert usable_memory_mib(proc, tmp_path / "groups") == 2048


def test_version_1_groups_count_and_a_containers_mount_is_its_group(
    proc: Path, tmp_path: Path
) -> None:
    write(proc / "self/cgroup", "5:cpu:/x\n4:memory:/docker/abc\n0::/\n")
    write(tmp_path / "groups/memory/memory.limit_in_bytes", f"{1 << 30}\n")
    assert usable_memory_mib(proc, tmp_path / "groups") == 1024


@pytest.mark.parametrize("text", ["", "nonsense", "0::/../../etc\n", "4:memory\n", "\0::::"])
def test_odd_files_are_no_limit(proc: Path, tmp_path: Path, text: str) -> None:
    write(proc / "self/cgroup", text)
    assert usable_memory_mib(proc, tmp_path / "groups") == 8192
    write(proc / "meminfo", text)
    assert usable_memory_mib(proc, tmp_path / "groups") is None


def test_the_default_is_a_share_of_what_may_be_used() -> None:
    usable = usable_memory_mib()
    assert usable is not None
    assert MemoryAdmission().limit == int(usable * 0.75)
    assert memory_admission.limit > 0
    assert SpawnConcurrency().limit >= 2
