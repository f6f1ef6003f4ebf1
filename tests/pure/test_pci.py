"""Configuration space takes any access, and a BAR answers only where it may."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.devices.pci import (
    CONFIG_SIZE,
    ECAM_FUNCTION_SIZE,
    ECAM_SIZE,
    PciBus,
    PciFunction,
)

_WINDOW, _WINDOW_SIZE = 0x10_0000_0000, 0x10_0000
_BAR_SIZE = 0x4000


class _Function(PciFunction):
    """A function that remembers where its BAR is said to be."""

    def __init__(self, bar_size: int = _BAR_SIZE) -> None:
        super().__init__(
            vendor_id=0x1AF4, device_id=0x1234, class_code=0xFF0000, revision=1, bar_size=bar_size
        )
        self.at: int | None = None
        self.moves: list[int | None] = []

    def bar_moved(self, address: int | None) -> None:
        self.at = address
        self.moves.append(address)


def _bus(*functions: PciFunction) -> PciBus:
    bus = PciBus(_WINDOW, _WINDOW_SIZE)
    for device, function in enumerate(functions, 1):
        bus.add(function, device=device)
    return bus


def _at(device: int, register: int = 0, number: int = 0) -> int:
    return (8 * device + number) * ECAM_FUNCTION_SIZE + register


def _set_bar(bus: PciBus, device: int, address: int) -> None:
    bus.write(_at(device, 0x10), 4, address & 0xFFFF_FFFF)
    bus.write(_at(device, 0x14), 4, address >> 32)


def test_a_scan_finds_the_bridge_and_the_functions_and_nothing_else() -> None:
    bus = _bus(_Function(), _Function())
    found = {
        slot: bus.read(slot * ECAM_FUNCTION_SIZE, 4)
        for slot in range(256)
        if bus.read(slot * ECAM_FUNCTION_SIZE, 2) != 0xFFFF
    }
    assert found == {0: 0x0008_1B36, 8: 0x1234_1AF4, 16: 0x1234_1AF4}
    assert bus.read(_at(0, 0x08), 4) == 0x0600_0000


def test_a_bar_says_its_size_when_all_ones_are_written() -> None:
    bus = _bus(_Function())
    assert bus.read(_at(1, 0x10), 8) == _WINDOW | 4
    bus.write(_at(1, 0x10), 4, 0xFFFF_FFFF)
    bus.write(_at(1, 0x14), 4, 0xFFFF_FFFF)
    assert bus.read(_at(1, 0x10), 4) == 0x1_0000_0000 - _BAR_SIZE | 4
    assert bus.read(_at(1, 0x14), 4) == 0xFFFF_FFFF
    for register in (0x18, 0x1C, 0x20, 0x24, 0x30):
        bus.write(_at(1, register), 4, 0xFFFF_FFFF)
        assert bus.read(_at(1, register), 4) == 0


def test_a_bar_answers_only_while_memory_decoding_is_on() -> None:
    function = _Function()
    bus = _bus(function)
    assert bus.find(_WINDOW) is None
    bus.write(_at(1, 4), 2, 2)
    assert bus.find(_WINDOW) == (function, 0)
    assert bus.find(_WINDOW + _BAR_SIZE - 1) == (function, _BAR_SIZE - 1)
    assert bus.find(_WINDOW + _BAR_SIZE) is None
    assert bus.find(_WINDOW - 1) is None
    bus.write(_at(1, 4), 2, 0)
    assert bus.find(_WINDOW) is None
    assert function.moves == [_WINDOW, None]


def test_a_bar_that_is_moved_answers_there() -> None:
    function = _Function()
    bus = _bus(function)
    bus.write(_at(1, 4), 1, 2)
    _set_bar(bus, 1, _WINDOW + 0x8123)
    assert bus.read(_at(1, 0x10), 4) == 0x8004
    assert bus.find(_WINDOW + 0x8010) == (function, 0x10)
    assert function.moves == [_WINDOW, None, _WINDOW + 0x8000]


@pytest.mark.parametrize(
    "address", [0, 0xFEE0_0000, _WINDOW - _BAR_SIZE, _WINDOW + _WINDOW_SIZE, 2**64 - _BAR_SIZE]
)
def test_a_bar_outside_of_the_window_answers_nowhere(address: int) -> None:
    function = _Function()
    bus = _bus(function)
    bus.write(_at(1, 4), 2, 2)
    _set_bar(bus, 1, address)
    assert function.at is None
    assert bus.find(address) is None


def test_of_two_bars_in_one_place_one_answers() -> None:
    first, second = _Function(), _Function()
    bus = _bus(first, second)
    bus.write(_at(1, 4), 2, 2)
    bus.write(_at(2, 4), 2, 2)
    assert (first.at, second.at) == (_WINDOW, _WINDOW + _BAR_SIZE)
    _set_bar(bus, 1, _WINDOW + _BAR_SIZE)
    assert (first.at, second.at) == (_WINDOW + _BAR_SIZE, None)
    _set_bar(bus, 1, _WINDOW)
    assert (first.at, second.at) == (_WINDOW, _WINDOW + _BAR_SIZE)


def test_functions_of_one_device_are_found_through_the_first() -> None:
    bus = PciBus(_WINDOW, _WINDOW_SIZE)
    bus.add(_Function(), device=3, number=2)
    bus.add(_Function(), device=3)
    bus.add(_Function(), device=4)
    bus.add(_Function(), device=4, number=7)
    bus.add(_Function(), device=5)
    assert [bus.read(_at(device, 0x0E), 1) for device in (3, 4, 5)] == [0x80, 0x80, 0]


@pytest.mark.parametrize(("device", "number"), [(0, 0), (1, 0), (32, 0), (2, 8), (-1, 0)])
def test_a_slot_that_is_taken_or_is_none_is_refused(device: int, number: int) -> None:
    bus = _bus(_Function())
    with pytest.raises(ValueError, match="slot"):
        bus.add(_Function(), device=device, number=number)


def test_a_window_that_is_full_is_an_error() -> None:
    bus = PciBus(_WINDOW, 2 * _BAR_SIZE)
    bus.add(_Function(0x1000), device=1)
    bus.add(_Function(), device=2)
    with pytest.raises(ValueError, match="room"):
        bus.add(_Function(), device=3)


def test_capabilities_that_do_not_fit_are_an_error() -> None:
    function = _Function()
    with pytest.raises(ValueError, match="capabilities"):
        for _ in range(20):
            function._add_capability(9, bytes(18))


_offset = st.one_of(
    st.integers(0, ECAM_SIZE - 1),
    st.builds(_at, st.integers(0, 3), st.integers(0, CONFIG_SIZE + 8)),
    st.builds(lambda d, o: _at(d) - o, st.integers(1, 3), st.integers(1, 8)),
)
_writes = st.lists(st.tuples(_offset, st.integers(1, 8), st.integers(0, 2**64 - 1)), max_size=40)


@given(_writes)
def test_any_access_is_taken_and_only_what_may_changes(
    writes: list[tuple[int, int, int]],
) -> None:
    functions = [_Function(), _Function(0), _Function(0x10000)]
    bus = _bus(*functions)
    fixed = [bus.read(_at(slot, register), 4) for slot in (0, 1, 2, 3) for register in (0, 8, 0x2C)]
    for offset, size, value in writes:
        bus.write(offset, size, value)
        assert 0 <= bus.read(offset, size) < 1 << 8 * size
        placed = [(f.at, f) for f in functions if f.at is not None]
        for start, function in placed:
            assert start >= _WINDOW
            assert start + function.bar_size <= _WINDOW + _WINDOW_SIZE
            assert bus.find(start) == (function, 0)
            assert sum(start < o + f.bar_size and o < start + function.bar_size
                       for o, f in placed) == 1  # fmt: skip
    assert fixed == [
        bus.read(_at(slot, register), 4) for slot in (0, 1, 2, 3) for register in (0, 8, 0x2C)
    ]
    again = [_Function(), _Function(0), _Function(0x10000)]
    copy = _bus(*again)
    copy.load(json.loads(json.dumps(bus.save())))
    assert copy.save() == bus.save()
    assert [f.at for f in again] == [f.at for f in functions]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"00": {}, "08": {}},
        {"00": None, "08": None},
        {"00": {"config": "00"}, "08": {"config": "00"}},
        {"00": {"config": "00" * CONFIG_SIZE}, "08": {"config": "00" * CONFIG_SIZE}},
        {"00": {"config": 5}, "08": {"config": "zz"}},
    ],
)
def test_a_state_of_something_else_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of any kind
        _bus(_Function()).load(state)
