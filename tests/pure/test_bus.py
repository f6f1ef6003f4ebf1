"""A bus gives every access an answer; power registers say how a guest wants to end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine.devices.bus import Bus, Range
from trio_supermachine.devices.power import (
    RESET,
    RESET_VALUE,
    SLEEP_CONTROL,
    AcpiPower,
    KeyboardReset,
    PowerEvent,
)

addresses = st.integers(0, (1 << 64) - 1) | st.integers(0, 64)
sizes = st.integers(1, 8)
values = st.integers(0, (1 << 64) - 1)


class Memory:
    """Registers that are plain bytes, and complain of accesses that leave them."""

    def __init__(self, length: int) -> None:
        self.data = bytearray(length)

    def read(self, offset: int, size: int) -> int:
        assert 0 <= offset <= offset + size <= len(self.data)
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        assert 0 <= offset <= offset + size <= len(self.data)
        self.data[offset : offset + size] = value.to_bytes(8, "little")[:size]


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(start, length) of ranges that do not overlap, in any order."""
    start, found = 0, []
    for _ in range(draw(st.integers(0, 5))):
        start += draw(st.integers(0, 6))
        length = draw(st.integers(1, 9))
        found.append((start, length))
        start += length
    return draw(st.permutations(found))


@settings(deadline=None)
@given(layouts(), st.lists(st.tuples(st.integers(0, 80), sizes, values), max_size=30))
def test_a_bus_is_like_bytes_with_holes_of_ones(
    ranges: list[tuple[int, int]], accesses: list[tuple[int, int, int]]
) -> None:
    bus = Bus(Range(start, length, Memory(length)) for start, length in ranges)
    model = {start + i: 0 for start, length in ranges for i in range(length)}
    for address, size, value in accesses:
        bus.write(address, size, value)
        for i, byte in enumerate(value.to_bytes(8, "little")[:size]):
            if address + i in model:
                model[address + i] = byte
        for start in range(max(0, address - 8), address + 8):
            expected = bytes(model.get(start + i, 0xFF) for i in range(size))
            assert bus.read(start, size) == int.from_bytes(expected, "little")


@settings(deadline=None)
@given(addresses, sizes, values)
def test_nobody_answers_with_ones(address: int, size: int, value: int) -> None:
    bus = Bus(())
    bus.write(address, size, value)
    assert bus.read(address, size) == (1 << 8 * size) - 1


def test_what_a_handler_returns_is_cut_to_the_size() -> None:
    class Wide:
        def read(self, offset: int, size: int) -> int:
            return -1

        def write(self, offset: int, size: int, value: int) -> None:
            pass

    assert Bus((Range(0, 8, Wide()),)).read(0, 2) == 0xFFFF


@pytest.mark.parametrize("ranges", [[(0, 4), (3, 2)], [(8, 2), (0, 9)], [(5, 0)], [(1, 2), (1, 2)]])
def test_ranges_that_overlap_or_are_empty_are_refused(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="overlaps"):
        Bus(Range(start, length, Memory(length)) for start, length in ranges)


def test_soft_off_and_reset_are_told() -> None:
    events: list[PowerEvent] = []
    power = AcpiPower(events.append)
    power.write(SLEEP_CONTROL, 1, 5 << 2)  # the type alone
    power.write(SLEEP_CONTROL, 1, 1 << 2 | 1 << 5)  # another state
    power.write(RESET, 1, 0)
    assert events == []
    power.write(SLEEP_CONTROL, 1, 5 << 2 | 1 << 5)
    power.write(RESET, 1, RESET_VALUE)
    assert events == ["shutdown", "reset"]


def test_the_keyboard_controller_resets_by_its_command_alone() -> None:
    events: list[PowerEvent] = []
    keyboard = KeyboardReset(events.append)
    keyboard.write(0, 1, 0xFE)  # data
    keyboard.write(4, 1, 0xD1)
    assert events == []
    keyboard.write(4, 1, 0xFE)
    assert events == ["reset"]
    assert keyboard.read(4, 1) == 0  # never busy


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), sizes, values), max_size=20))
def test_any_access_to_power_registers_is_harmless(accesses: list[tuple[int, int, int]]) -> None:
    events: list[PowerEvent] = []
    bus = Bus((Range(0, 5, KeyboardReset(events.append)), Range(5, 3, AcpiPower(events.append))))
    for address, size, value in accesses:
        bus.write(address, size, value)
        assert 0 <= bus.read(address, size) < 1 << 8 * size
    assert set(events) <= {"shutdown", "reset"}
