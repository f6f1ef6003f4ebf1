"""A guest's address is good only wholly inside one range of its memory."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.devices.memory import GuestMemory, GuestMemoryError

_LOW, _HIGH, _SIZE = 0x1000, 0x1_0000_0000, 0x2000


def _memory() -> GuestMemory:
    return GuestMemory(
        [(_HIGH, memoryview(bytearray(_SIZE))), (_LOW, memoryview(bytearray(_SIZE)))]
    )


_around = st.builds(
    lambda base, offset: base + offset,
    st.sampled_from([0, _LOW, _LOW + _SIZE, _HIGH, _HIGH + _SIZE, 2**32, 2**63, 2**64 - 1]),
    st.integers(-0x20, 0x20),
)


@given(address=_around, length=_around)
def test_an_access_is_inside_one_range_or_refused(address: int, length: int) -> None:
    memory = _memory()
    inside = length >= 0 and any(
        start <= address and address + length <= start + _SIZE for start in (_LOW, _HIGH)
    )
    if inside:
        assert len(memory.view(address, length)) == length
    else:
        with pytest.raises(GuestMemoryError):
            memory.view(address, length)


def test_a_view_is_the_memory_and_a_read_is_a_copy() -> None:
    memory = _memory()
    copy = memory.read(_HIGH, 4)
    memory.view(_HIGH, 4)[1:3] = b"ab"
    assert copy == bytes(4)
    assert memory.read(_HIGH, 4) == b"\0ab\0"
    memory.write(_HIGH + 3, b"c")
    assert memory.read(_HIGH, 4) == b"\0abc"


def test_nothing_is_written_when_the_end_is_outside() -> None:
    memory = _memory()
    with pytest.raises(GuestMemoryError):
        memory.write(_LOW + _SIZE - 2, b"abc")
    assert memory.read(_LOW + _SIZE - 2, 2) == bytes(2)


def test_ranges_and_size() -> None:
    memory = _memory()
    assert [(start, len(view)) for start, view in memory.ranges] == [(_LOW, _SIZE), (_HIGH, _SIZE)]
    assert memory.size == 2 * _SIZE


@pytest.mark.parametrize("start", [0, 0xFFF])
def test_ranges_that_overlap_are_refused(start: int) -> None:
    page = memoryview(bytearray(0x1000))
    with pytest.raises(ValueError, match="overlap"):
        GuestMemory([(0, page), (start, page)])


def test_memory_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="writable"):
        GuestMemory([(0, memoryview(bytes(16)))])


def test_a_closed_memory_lets_go_of_its_mapping() -> None:
    with mmap.mmap(-1, 0x1000) as mapping:
        memory = GuestMemory([(0, memoryview(mapping))])
        memory.write(0, b"x")
        memory.close()
        memory.close()
        with pytest.raises(GuestMemoryError):
            memory.read(0, 1)
        with pytest.raises(GuestMemoryError):
            memory.view(0, 0)
