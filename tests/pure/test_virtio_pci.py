"""A driver sets a virtio device up over PCI, and nothing that it does breaks the host's side."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.devices import virtio_common as common
from trio_supermachine.devices.memory import GuestMemory
from trio_supermachine.devices.pci import PciBus
from trio_supermachine.devices.virtio import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    STATUS_ACKNOWLEDGE,
    STATUS_DEVICE_NEEDS_RESET,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
)
from trio_supermachine.devices.virtio_pci import (
    CAP_COMMON_CFG,
    CAP_DEVICE_CFG,
    CAP_ISR_CFG,
    CAP_NOTIFY_CFG,
    CAP_PCI_CFG,
    VirtioPciFunction,
)

from ..support.fuzz_virtio import TARGETS, fuzz
from ..support.virtio_driver import WINDOW, WINDOW_SIZE, EchoDevice, PciDriver, Ring, Shell, plug

_SIZE = 0x40000
_DATA = 0x20000


@attrs.define
class Machine:
    """An echo device, its driver and its rings."""

    nursery: trio.Nursery | None = None
    queues: int = 2
    device: EchoDevice = attrs.field(init=False)
    memory: GuestMemory = attrs.field(init=False)
    shell: Shell = attrs.field(init=False)
    bus: PciBus = attrs.field(init=False)
    function: VirtioPciFunction = attrs.field(init=False)
    driver: PciDriver = attrs.field(init=False)
    rings: list[Ring] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.memory = GuestMemory([(0, memoryview(bytearray(_SIZE)))])
        self.plug()
        self.new_rings()

    def plug(self) -> None:
        """A function as after power-on."""
        self.device = EchoDevice(self.queues)
        self.shell = Shell(self.nursery)
        self.bus, self.function = plug(self.device, self.memory, self.shell)
        self.driver = PciDriver(self.bus)

    def new_rings(self, event_index: bool = True) -> None:
        self.rings = [
            Ring(self.memory, 0x1000 * (1 + index), 16, event_index=event_index)
            for index in range(self.queues)
        ]

    def start(self) -> None:
        self.new_rings()
        self.driver.start(self.rings)

    def ask(self, queue: int, text: bytes) -> None:
        at = _DATA + 0x1000 * queue
        self.memory.write(at, text)
        self.rings[queue].add([(at, len(text))], [(at + 0x800, len(text))])
        self.driver.notify(queue)

    async def answer(self, queue: int) -> bytes:
        with trio.fail_after(60):
            while not (used := self.rings[queue].used()):
                await self.shell.signalled.wait()
        return self.memory.read(_DATA + 0x1000 * queue + 0x800, used[-1][1])

    async def wait_reset(self) -> None:
        with trio.fail_after(60):
            while self.driver.status:
                await trio.lowlevel.checkpoint()


@asynccontextmanager
async def _machine() -> AsyncIterator[Machine]:
    async with trio.open_nursery() as nursery:
        yield Machine(nursery)
        nursery.cancel_scope.cancel()


# --- what a right driver sees ---


async def test_a_device_serves_its_queues_and_interrupts() -> None:
    async with _machine() as machine:
        machine.start()
        for text in (b"some", b"more"):
            for queue in (0, 1):
                machine.ask(queue, text)
                assert await machine.answer(queue) == text.upper()
        assert machine.shell.signals == [1, 2, 1, 2]
        assert machine.shell.kicks == [0, 1, 0, 1]
        assert machine.device.driver_features == F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | 1


def test_a_driver_finds_what_it_needs_in_configuration_space() -> None:
    driver = Machine().driver
    assert (driver.vendor, driver.device) == (0x1AF4, 0x1040 + 42)
    assert driver.config(8, 1) == 1
    assert driver.bar == WINDOW
    assert set(driver.parts) == {
        CAP_COMMON_CFG,
        CAP_NOTIFY_CFG,
        CAP_ISR_CFG,
        CAP_DEVICE_CFG,
        CAP_PCI_CFG,
    }
    assert driver.multiplier == 4
    assert driver.config(driver.msix + 2, 2) == 2
    driver.enable()
    assert driver.get(common.NUM_QUEUES, 2) == 2
    device = driver.parts[CAP_DEVICE_CFG]
    assert driver.read(device, 8).to_bytes(8, "little") == b"capitals"
    assert driver.read(device + 5, 4).to_bytes(4, "little") == b"als\0"


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (F_VERSION_1, True),
        (F_VERSION_1 | 1, True),
        (F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC, True),
        (0, False),
        (1, False),
        (F_VERSION_1 | 2, False),
        (F_VERSION_1 | 1 << 63, False),
        (F_VERSION_1 | 1 << 40, False),
    ],
)
def test_features_are_negotiated(features: int, accepted: bool) -> None:
    driver = Machine().driver
    driver.enable()
    assert driver.offered() == F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | 1
    assert driver.accept(features) is accepted
    driver.set(common.DRIVER_FEATURE_SELECT, 4, 0)
    driver.set(common.DRIVER_FEATURE, 4, 0x55)
    assert driver.get(common.DRIVER_FEATURE, 4) == (features & 0xFFFF_FFFF if accepted else 0x55)
    driver.set(common.DEVICE_FEATURE_SELECT, 4, 2)
    driver.set(common.DRIVER_FEATURE_SELECT, 4, 0xFFFF_FFFF)
    assert driver.get(common.DEVICE_FEATURE, 4) == driver.get(common.DRIVER_FEATURE, 4) == 0


def test_a_device_does_not_start_before_its_features_are_settled() -> None:
    machine = Machine()
    machine.driver.enable()
    machine.driver.status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK
    assert machine.driver.status == STATUS_ACKNOWLEDGE | STATUS_DRIVER
    assert machine.shell.starts == 0


def test_status_bits_are_only_added() -> None:
    driver = Machine().driver
    driver.enable()
    driver.status = STATUS_ACKNOWLEDGE
    driver.status = STATUS_DRIVER | STATUS_FAILED | 0x30 | STATUS_DEVICE_NEEDS_RESET
    assert driver.status == STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FAILED
    driver.status = 0
    assert driver.status == 0


def test_a_queue_keeps_what_it_can_be_and_stays_once_enabled() -> None:
    machine = Machine()
    driver = machine.driver
    driver.enable()
    assert driver.get(common.QUEUE_SIZE, 2) == 64
    for size, kept in ((32, 32), (0, 32), (24, 32), (128, 32), (64, 64)):
        driver.set(common.QUEUE_SIZE, 2, size)
        assert driver.get(common.QUEUE_SIZE, 2) == kept
    driver.set(common.QUEUE_DESC, 8, 0x1_2345_6780)
    assert driver.get(common.QUEUE_DESC, 8) == 0x1_2345_6780
    driver.set(common.QUEUE_MSIX_VECTOR, 2, 3)
    assert driver.get(common.QUEUE_MSIX_VECTOR, 2) == common.NO_VECTOR
    driver.set(common.QUEUE_ENABLE, 2, 2)
    assert driver.get(common.QUEUE_ENABLE, 2) == 0
    driver.set(common.QUEUE_ENABLE, 2, 1)
    driver.set(common.QUEUE_ENABLE, 2, 0)
    driver.set(common.QUEUE_SIZE, 2, 16)
    driver.set(common.QUEUE_DESC, 4, 0)
    assert driver.get(common.QUEUE_ENABLE, 2) == 1
    assert driver.get(common.QUEUE_SIZE, 2) == 64
    assert driver.get(common.QUEUE_DESC, 4) == 0x2345_6780
    driver.set(common.QUEUE_SELECT, 2, 1)
    assert driver.get(common.QUEUE_ENABLE, 2) == 0
    assert driver.get(common.QUEUE_NOTIFY_OFF, 2) == 1


def test_a_queue_that_is_not_there_has_size_zero() -> None:
    driver = Machine().driver
    driver.enable()
    driver.set(common.QUEUE_SELECT, 2, 2)
    for register in (common.QUEUE_SIZE, common.QUEUE_ENABLE, common.QUEUE_DESC):
        driver.set(register, 2, 1)
        assert driver.get(register, 2) == 0


async def test_a_queue_that_was_not_enabled_has_no_chains() -> None:
    async with _machine() as machine:
        machine.driver.start(machine.rings[:1])
        assert [queue is None for queue in machine.function.virtqueues] == [False, True]
        machine.driver.notify(1)
        machine.ask(0, b"one")
        assert await machine.answer(0) == b"ONE"


# --- resets ---


async def test_a_reset_waits_for_the_device_and_it_can_start_again() -> None:
    async with _machine() as machine:
        for round_ in range(1, 4):
            machine.start()
            machine.ask(0, b"x")
            assert await machine.answer(0) == b"X"
            machine.driver.status = 0
            assert machine.driver.status != 0
            machine.driver.set(common.QUEUE_SELECT, 2, 0)  # has no effect yet
            assert machine.driver.get(common.QUEUE_SELECT, 2) == 1
            await machine.wait_reset()
            assert machine.shell.resets == machine.device.resets == round_
            assert machine.function.virtqueues == ()
            assert machine.driver.get(common.QUEUE_ENABLE, 2) == 0
            assert machine.driver.get(common.CONFIG_MSIX_VECTOR, 2) == common.NO_VECTOR


def test_a_reset_of_a_device_that_never_ran_is_done_at_once() -> None:
    machine = Machine()
    machine.driver.enable()
    assert machine.driver.accept(F_VERSION_1)
    machine.driver.status = 0
    assert machine.driver.status == 0
    assert machine.shell.resets == 0
    assert machine.device.resets == 1


async def test_a_driver_at_fault_gets_needs_reset_and_an_interrupt() -> None:
    async with _machine() as machine:
        machine.start()
        machine.rings[1].publish(1000)
        machine.driver.notify(1)
        with trio.fail_after(60):
            while not machine.driver.status & STATUS_DEVICE_NEEDS_RESET:
                await trio.lowlevel.checkpoint()
        assert len(machine.shell.faults) == 1
        assert machine.shell.signals == [0]
        isr = machine.driver.parts[CAP_ISR_CFG]
        assert [machine.driver.read(isr, 1) for _ in range(2)] == [2, 0]
        machine.driver.notify(0)
        assert not machine.function.running
        machine.driver.status = 0
        await machine.wait_reset()
        machine.start()
        machine.ask(1, b"again")
        assert await machine.answer(1) == b"AGAIN"


async def test_faults_of_two_queues_at_once_are_one_fault_of_the_device() -> None:
    async with _machine() as machine:
        machine.start()
        for ring in machine.rings:
            ring.publish(1000)
        with trio.fail_after(60):
            while not machine.driver.status & STATUS_DEVICE_NEEDS_RESET:
                await trio.lowlevel.checkpoint()
        assert machine.shell.signals == [0]


@pytest.mark.parametrize("address", [_SIZE, 0x1001, 2**64 - 16])
def test_a_queue_out_of_memory_does_not_start(address: int) -> None:
    machine = Machine()
    machine.rings[0].used_ring = address
    machine.driver.start(machine.rings)
    assert machine.driver.status & STATUS_DEVICE_NEEDS_RESET
    assert machine.driver.status & STATUS_DRIVER_OK
    assert machine.shell.starts == 0
    machine.driver.status = 0
    assert machine.driver.status == 0


# --- interrupts and doorbells ---


async def test_an_interrupt_waits_while_its_vector_is_masked() -> None:
    async with _machine() as machine:
        machine.start()
        driver = machine.driver
        driver.write(driver.table + 16 + 12, 4, 1)
        machine.ask(0, b"x")
        with trio.fail_after(60):
            while not driver.read(driver.pending, 8):
                await trio.lowlevel.checkpoint()
        assert machine.shell.signals == []
        driver.write(driver.table + 16 + 12, 4, 0)
        assert machine.shell.signals == [1]
        assert driver.read(driver.pending, 8) == 0


def test_a_change_of_the_configuration_is_told_and_counted() -> None:
    machine = Machine()
    machine.start()
    before = machine.driver.get(common.CONFIG_GENERATION, 1)
    for _ in range(256):
        machine.function.config_changed()
    machine.function.config_changed()
    assert machine.driver.get(common.CONFIG_GENERATION, 1) == (before + 1) & 0xFF
    assert machine.shell.signals == [0] * 257


def test_doorbells_are_where_the_notify_registers_are() -> None:
    machine = Machine()
    driver = machine.driver
    driver.set_config(4, 2, 2)
    notify = driver.parts[CAP_NOTIFY_CFG]
    driver.set_config(0x10, 4, (WINDOW + 0x8_0000) & 0xFFFF_FFFF)
    driver.set_config(4, 2, 0)
    assert machine.shell.doorbells == [
        WINDOW + notify,
        None,
        WINDOW + 0x8_0000 + notify,
        None,
    ]


def test_the_bar_can_be_reached_through_configuration_space() -> None:
    machine = Machine()
    driver = machine.driver

    def point(offset: int, length: int, bar: int = 0) -> None:
        driver.set_config(driver.window + 4, 1, bar)
        driver.set_config(driver.window + 8, 4, offset)
        driver.set_config(driver.window + 12, 4, length)

    data = driver.window + 16
    point(driver.parts[CAP_COMMON_CFG] + common.DEVICE_STATUS, 1)
    driver.set_config(data, 1, STATUS_ACKNOWLEDGE)
    assert machine.function.status == STATUS_ACKNOWLEDGE
    point(driver.parts[CAP_DEVICE_CFG] + 4, 4)
    assert driver.config(data, 4).to_bytes(4, "little") == b"tals"
    for offset, length, bar in ((1, 4, 0), (2**32 - 4, 4, 0), (0, 3, 0), (0, 0, 0), (0, 4, 1)):
        point(offset, length, bar)
        driver.set_config(data, 4, 0x1234_5678)
        assert driver.config(data, 4) == 0x1234_5678


# --- snapshots ---


async def test_a_device_goes_on_from_a_state_as_if_nothing_had_been() -> None:
    async with _machine() as machine:
        machine.start()
        machine.ask(0, b"before")
        assert await machine.answer(0) == b"BEFORE"
        await machine.shell.pause()
        machine.ask(1, b"while it stood still")
        state = json.loads(json.dumps(machine.bus.save()))

        machine.plug()
        machine.bus.load(state)
        assert machine.bus.save() == state
        assert machine.device.echoed == 1
        assert machine.shell.starts == 1
        assert machine.shell.changed == [0, 1, 2]
        assert len(machine.shell.doorbells) == 1
        assert await machine.answer(1) == b"WHILE IT STOOD STILL"
        machine.ask(0, b"after")
        assert await machine.answer(0) == b"AFTER"


async def test_a_device_goes_on_after_a_pause() -> None:
    async with _machine() as machine:
        machine.start()
        for _ in range(3):
            machine.ask(0, b"one")
            await machine.shell.pause()
            machine.ask(1, b"two")
            machine.shell.start()
            assert await machine.answer(0) == b"ONE"
            assert await machine.answer(1) == b"TWO"


async def test_a_reset_that_the_driver_waits_for_is_done_in_the_saved_state() -> None:
    machine = Machine()
    machine.start()
    machine.driver.status = 0
    state = machine.bus.save()
    machine.plug()
    machine.bus.load(state)
    assert machine.driver.status == 0
    assert machine.shell.starts == 0


@pytest.mark.parametrize(
    "change",
    [
        {"device_id": 2},
        {"device": "zz"},
        {"device": "00"},
        {"isr": -1},
        {"virtqueues": [None, None]},
        {"virtqueues": [{"next_available": 0, "next_used": 0}]},
        {"virtqueues": [{}, {}]},
        {"virtqueues": [{"next_available": 0}] * 2},
        {"virtqueues": [{"next_available": 65536, "next_used": 0}] * 2},
        {"virtqueues": 5},
        {"common": {}},
        {"msix": {"control": 0, "pending": "0", "entries": []}},
        {"config": ""},
    ],
)
def test_a_state_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    machine = Machine()
    machine.start()
    state = machine.bus.save()
    state["08"] |= change
    machine.plug()
    with pytest.raises(ValueError):  # noqa: PT011 - of any kind
        machine.bus.load(state)


@pytest.mark.parametrize(
    "change",
    [
        {"status": 256},
        {"status": 0x20},
        {"driver_features": F_VERSION_1 | 2},
        {"generation": "1"},
        {"queues": []},
        {"queue_select": -1},
    ],
)
def test_registers_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    machine = Machine()
    machine.start()
    state = machine.bus.save()
    state["08"]["common"] |= change
    machine.plug()
    with pytest.raises(ValueError):  # noqa: PT011 - of any kind
        machine.bus.load(state)


@pytest.mark.parametrize("sizes", [(), (3,), (65536,), (16,) * 300])
def test_a_device_with_queues_that_cannot_be_is_refused(sizes: tuple[int, ...]) -> None:
    device = EchoDevice()
    device.queue_sizes = sizes
    with pytest.raises(ValueError, match="queue"):
        plug(device, GuestMemory([]), Shell())


# --- anything at all ---

_register = st.one_of(st.integers(0, 0x40), st.integers(0x800, 0x804), st.integers(0, 0x8010))
_value = st.sampled_from([0, 1, 2, 4, 8, 0xFF, 0xFFFF, 0x1000, 2**32 - 1, 2**64 - 1])


@given(
    st.lists(
        st.tuples(st.sampled_from(["bar", "config"]), _register, st.integers(1, 8), _value),
        max_size=60,
    ),
    st.booleans(),
)
def test_any_access_is_taken(accesses: list[tuple[str, int, int, int]], started: bool) -> None:
    machine = Machine()
    if started:
        machine.start()
    function = machine.function
    for what, at, size, value in accesses:
        value &= (1 << 8 * size) - 1
        if what == "bar":
            function.write_bar(at, size, value)
            found = function.read_bar(at, size)
        else:
            machine.bus.write(8 * 4096 + at, size, value)
            found = machine.bus.read(8 * 4096 + at, size)
        assert 0 <= found < 1 << 8 * size
        if machine.shell.resets > machine.device.resets:
            function.finish_reset()
    state = machine.bus.save()
    machine.plug()
    machine.bus.load(json.loads(json.dumps(state)))
    assert machine.bus.save() == state


@pytest.mark.parametrize("target", TARGETS)
async def test_a_hostile_driver_costs_its_device_and_nothing_else(target: str) -> None:
    for seed in range(30):
        await fuzz(target, seed)


def test_the_window_is_full_of_functions_without_a_clash() -> None:
    bus = PciBus(WINDOW, WINDOW_SIZE)
    memory = GuestMemory([(0, memoryview(bytearray(0x1000)))])
    places = set()
    for slot in range(1, 32):
        plug(EchoDevice(), memory, Shell(), bus, slot)
        places.add(PciDriver(bus, slot).bar)
    assert len(places) == 31
