"""MSI-X: a vector sends when it is enabled and not masked; what is masked waits."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.devices.msix import CONTROL_ENABLE, CONTROL_FUNCTION_MASK, Msix, MsixMessage


def _set(msix: Msix, vector: int, address: int, data: int, control: int) -> None:
    at = 16 * vector
    for offset, value in ((0, address), (4, address >> 32), (8, data), (12, control)):
        msix.write_table(at + offset, 4, value & 0xFFFF_FFFF)


def _enabled(vectors: int = 3) -> Msix:
    msix = Msix(vectors)
    msix.set_control(CONTROL_ENABLE)
    for vector in range(vectors):
        _set(msix, vector, 0xFEE0_0000, 0x40 + vector, 0)
    return msix


def test_all_is_masked_and_off_at_first() -> None:
    msix = Msix(3)
    assert msix.control == 2
    assert [msix.read_table(16 * vector + 12, 4) for vector in range(3)] == [1, 1, 1]
    assert not msix.trigger(0)
    assert msix.read_pending(0, 8) == 0


def test_an_enabled_vector_sends_its_message() -> None:
    msix = _enabled()
    assert msix.message(1) == MsixMessage(0xFEE0_0000, 0x41)
    assert msix.trigger(1)
    assert msix.read_pending(0, 8) == 0


def test_a_masked_vector_is_pending_until_it_is_taken() -> None:
    msix = _enabled()
    assert msix.write_table(16 + 12, 4, 1) == [1]
    assert not msix.trigger(1)
    assert msix.read_pending(0, 8) == 2
    assert msix.write_table(16 + 12, 4, 0) == [1]
    assert msix.take_pending(1)
    assert not msix.take_pending(1)


def test_the_function_mask_masks_all_and_disabling_forgets() -> None:
    msix = _enabled()
    assert msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == [0, 1, 2]
    assert not msix.trigger(2)
    assert msix.read_pending(0, 1) == 4
    assert msix.set_control(0) == []
    assert msix.read_pending(0, 1) == 0


def test_only_what_makes_a_difference_is_a_change() -> None:
    msix = _enabled()
    assert msix.write_table(8, 4, 0x40) == []
    assert msix.write_table(8, 4, 0x50) == [0]
    assert msix.write_table(12, 4, 1) == [0]
    assert msix.write_table(8, 4, 0x60) == []


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("offset", [0, 3, 13, 47, 48, 5000])
def test_any_access_is_bytes_of_the_table(offset: int, size: int) -> None:
    msix = _enabled()
    before = b"".join(msix.read_table(at, 1).to_bytes(1, "little") for at in range(48))
    found = msix.read_table(offset, size).to_bytes(size, "little")
    assert found == before[offset : offset + size].ljust(size, b"\0")
    msix.write_table(offset, size, (1 << 8 * size) - 1)
    after = b"".join(msix.read_table(at, 1).to_bytes(1, "little") for at in range(48))
    assert after[:offset] == before[:offset]
    assert after[offset + size :] == before[offset + size :]


_step = st.one_of(
    st.tuples(st.just("table"), st.integers(0, 70), st.integers(1, 8), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("control"), st.just(0), st.just(2), st.integers(0, 0xFFFF)),
    st.tuples(st.just("trigger"), st.integers(0, 3), st.just(0), st.just(0)),
)


@given(st.lists(_step))
def test_every_change_of_a_message_is_told(steps: list[tuple[str, int, int, int]]) -> None:
    msix = Msix(4)
    known: dict[int, MsixMessage | None] = dict.fromkeys(range(4))
    for what, at, size, value in steps:
        changed: list[int] = []
        if what == "table":
            changed = msix.write_table(at, size, value)
        elif what == "control":
            changed = msix.set_control(value)
        elif msix.trigger(at):
            assert known[at] is not None
        known.update({vector: msix.message(vector) for vector in changed})
        assert known == {vector: msix.message(vector) for vector in range(4)}
        for vector, message in known.items():
            assert message is None or not message.address & 3, vector
    again = Msix(4)
    again.load(json.loads(json.dumps(msix.save())))
    assert again.save() == msix.save()
    assert {vector: again.message(vector) for vector in range(4)} == known


@pytest.mark.parametrize(
    "change",
    [
        {"entries": []},
        {"entries": ["ff" * 16] * 3},
        {"entries": [1, 2, 3]},
        {"pending": "8"},
        {"pending": "-1"},
        {"control": 1},
        {"control": "1"},
    ],
)
def test_a_state_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    msix = _enabled()
    with pytest.raises((ValueError, TypeError)):
        msix.load(msix.save() | change)


@pytest.mark.parametrize("vectors", [0, 2049])
def test_there_are_1_to_2048_vectors(vectors: int) -> None:
    with pytest.raises(ValueError, match="2048"):
        Msix(vectors)
