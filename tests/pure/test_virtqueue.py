"""Chains come out of a virtqueue as the driver put them in, or the driver is at fault."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.devices.memory import GuestMemory, GuestMemoryError
from trio_supermachine.devices.virtqueue import (
    MAX_INDIRECT,
    Chain,
    QueueFault,
    QueueState,
    Virtqueue,
)

from ..support.virtio_driver import INDIRECT, NEXT, WRITE, Ring, pack_descriptor

_SIZE = 0x40000
_DATA = 0x10000
_TABLE = 0x20000


def _memory() -> GuestMemory:
    return GuestMemory([(0, memoryview(bytearray(_SIZE)))])


def _ring(size: int = 8, *, event_index: bool = False) -> Ring:
    return Ring(_memory(), 0x1000, size, event_index=event_index)


def _take(queue: Virtqueue) -> Chain:
    chain = queue.pop()
    assert chain is not None
    return chain


# --- what a right driver sees ---


@pytest.mark.parametrize("table", [None, _TABLE])
def test_a_chain_comes_out_as_it_went_in(table: int | None) -> None:
    ring = _ring()
    queue = ring.device()
    ring.memory.write(_DATA, b"question")
    head = ring.add([(_DATA, 5), (_DATA + 5, 3)], [(_DATA + 0x100, 4)], table=table)
    chain = _take(queue)
    assert [bytes(view) for view in chain.readable] == [b"quest", b"ion"]
    assert (chain.readable_size, chain.writable_size) == (8, 4)
    chain.writable[0][:2] = b"no"
    queue.push(chain, 2)
    assert ring.used() == [(head, 2)]
    assert ring.memory.read(_DATA + 0x100, 4) == b"no\0\0"
    assert queue.pop() is None


def test_a_chain_may_end_in_an_indirect_table() -> None:
    ring = _ring()
    ring.memory.write(_TABLE, pack_descriptor(_DATA + 0x10, 2, WRITE))
    ring.set_descriptor(0, _DATA, 1, NEXT, 5)
    ring.set_descriptor(5, _TABLE, 16, INDIRECT | WRITE)  # the write flag there says nothing
    ring.publish(0)
    chain = _take(ring.device())
    assert (chain.readable_size, chain.writable_size) == (1, 2)


def test_an_indirect_table_may_be_longer_than_the_queue() -> None:
    ring = _ring(2)
    ring.add([(_DATA + at, 1) for at in range(MAX_INDIRECT)], table=_TABLE)
    assert len(_take(ring.device()).readable) == MAX_INDIRECT


def test_chains_may_come_back_in_any_order() -> None:
    ring = _ring()
    queue = ring.device()
    first, second = ring.add([(_DATA, 1)]), ring.add([(_DATA, 1)])
    chains = [_take(queue), _take(queue)]
    queue.push(chains[1], 0)
    queue.push(chains[0], 0)
    assert ring.used() == [(second, 0), (first, 0)]


_parts = st.lists(st.tuples(st.integers(0, 0xFF00), st.integers(1, 0x100)), max_size=3)


@given(
    size=st.sampled_from([4, 8, 32]),
    event_index=st.booleans(),
    chains=st.lists(st.tuples(_parts, _parts, st.booleans(), st.integers(0, 3)), max_size=60),
    start=st.sampled_from([0, 0xFFF0]),
)
def test_any_exchange_is_seen_the_same_by_both_sides(
    size: int,
    event_index: bool,
    chains: list[tuple[list[tuple[int, int]], list[tuple[int, int]], bool, int]],
    start: int,
) -> None:
    ring = _ring(size, event_index=event_index)
    ring.next_available = ring.next_used = ring._kicked = start
    ring.set_u16(ring.available + 2, start)
    ring.set_u16(ring.used_ring + 2, start)
    queue = ring.device(QueueState(start, start))
    asleep = not queue.enable_kicks()
    expected: list[tuple[int, list[tuple[int, int]], list[tuple[int, int]]]] = []
    out: list[Chain] = []
    for readable, writable, indirect, taken in chains:
        needed = 1 if indirect else len(readable) + len(writable)
        if (readable or writable) and len(ring.free) >= needed:
            table = _TABLE + 0x100 * ring.free[-1] if indirect else None
            at = [(address + 0x10000, length) for address, length in readable]
            to = [(address + 0x10000, length) for address, length in writable]
            expected.append((ring.add(at, to, table=table), at, to))
            # A device that asked is told.
            assert ring.wants_kick() or not asleep
            asleep = False
        for _ in range(taken):
            chain = queue.pop()
            assert (chain is None) == (not expected)
            if chain is None:
                asleep = not queue.enable_kicks()
                break
            head, at, to = expected.pop(0)
            assert chain.head == head
            assert [len(view) for view in chain.readable] == [length for _, length in at]
            assert [len(view) for view in chain.writable] == [length for _, length in to]
            out.append(chain)
        if taken != 1:
            before = [chain.head for chain in out]
            for chain in out:
                queue.push(chain, chain.writable_size)
            # A driver that wants to know is told.
            assert queue.should_interrupt() or not out
            assert [head for head, _ in ring.used()] == before
            out.clear()


# --- who is told of what ---


def test_interrupts_follow_the_drivers_flag() -> None:
    ring = _ring()
    queue = ring.device()
    assert not queue.should_interrupt()
    for forbidden in (False, True, False):
        ring.forbid_interrupts(forbidden)
        ring.add([(_DATA, 1)])
        queue.push(_take(queue))
        assert queue.should_interrupt() is not forbidden
        assert not queue.should_interrupt()


def test_interrupts_follow_the_event_index() -> None:
    ring = _ring(event_index=True)
    queue = ring.device()
    ring.set_used_event(2)
    told = []
    for _ in range(5):
        ring.add([(_DATA, 1)])
        queue.push(_take(queue))
        told.append(queue.should_interrupt())
    assert told == [False, False, True, False, False]
    ring.set_used_event(6)
    for _ in range(3):
        ring.add([(_DATA, 1)])
        queue.push(_take(queue))
    assert queue.should_interrupt()  # about a batch that passed it


@pytest.mark.parametrize("event_index", [False, True])
def test_a_driver_notifies_only_who_asked(event_index: bool) -> None:
    ring = _ring(event_index=event_index)
    queue = ring.device()
    assert not queue.enable_kicks()
    ring.add([(_DATA, 1)])
    assert ring.wants_kick()
    queue.disable_kicks()
    ring.add([(_DATA, 1)])
    assert not ring.wants_kick()
    assert queue.enable_kicks()
    _take(queue), _take(queue)
    assert not queue.enable_kicks()
    ring.add([(_DATA, 1)])
    assert ring.wants_kick()


def test_a_queue_goes_on_where_it_was_saved_and_interrupts_once_to_be_sure() -> None:
    ring = _ring()
    queue = ring.device()
    for _ in range(3):
        ring.add([(_DATA, 1)])
        queue.push(_take(queue))
    assert queue.save() == QueueState(3, 3)
    head = ring.add([(_DATA, 7)])
    again = ring.device(queue.save())
    assert again.should_interrupt()
    assert not again.should_interrupt()
    chain = _take(again)
    assert (chain.head, chain.readable_size) == (head, 7)
    again.push(chain, 1)
    assert ring.used()[-1] == (head, 1)


# --- a driver at fault ---


#: The first descriptors of the table, and those of an indirect table at _TABLE.
_FAULTS: dict[str, tuple[list[bytes], list[bytes]]] = {
    "next outside": ([pack_descriptor(_DATA, 1, NEXT, 8)], []),
    "a loop": ([pack_descriptor(_DATA, 1, NEXT, 0)], []),
    "a longer loop": (
        [pack_descriptor(_DATA, 1, NEXT, 1), pack_descriptor(_DATA, 1, NEXT, 0)],
        [],
    ),
    "no bytes": ([pack_descriptor(_DATA, 0)], []),
    "readable after writable": (
        [pack_descriptor(_DATA, 1, NEXT | WRITE, 1), pack_descriptor(_DATA, 1)],
        [],
    ),
    "indirect and next": ([pack_descriptor(_TABLE, 16, INDIRECT | NEXT, 1)], []),
    "indirect of no entries": ([pack_descriptor(_TABLE, 0, INDIRECT)], []),
    "indirect of half an entry": ([pack_descriptor(_TABLE, 24, INDIRECT)], []),
    "indirect too long": ([pack_descriptor(_TABLE, 16 * (MAX_INDIRECT + 1), INDIRECT)], []),
    "indirect of 4 GiB": ([pack_descriptor(_TABLE, 0xFFFF_FFF0, INDIRECT)], []),
    "indirect in indirect": (
        [pack_descriptor(_TABLE, 16, INDIRECT)],
        [pack_descriptor(_TABLE, 16, INDIRECT)],
    ),
    "loop in indirect": (
        [pack_descriptor(_TABLE, 32, INDIRECT)],
        [pack_descriptor(_DATA, 1, NEXT, 1), pack_descriptor(_DATA, 1, NEXT, 0)],
    ),
    "next outside of indirect": (
        [pack_descriptor(_TABLE, 16, INDIRECT)],
        [pack_descriptor(_DATA, 1, NEXT, 1)],
    ),
}


@pytest.mark.parametrize("name", _FAULTS)
def test_a_chain_that_cannot_be_is_a_fault_and_stays_one(name: str) -> None:
    ring = _ring()
    queue = ring.device()
    table, indirect = _FAULTS[name]
    ring.memory.write(ring.descriptors, b"".join(table))
    ring.memory.write(_TABLE, b"".join(indirect))
    ring.publish(0)
    for _ in range(2):
        with pytest.raises(QueueFault):
            queue.pop()
    assert queue.save() == QueueState(0, 0)


@pytest.mark.parametrize("index", [9, 0xFFFF])
def test_an_index_that_cannot_be_is_a_fault(index: int) -> None:
    ring = _ring()
    queue = ring.device()
    ring.set_u16(ring.available + 2, index)
    with pytest.raises(QueueFault):
        queue.pop()


def test_a_head_that_cannot_be_is_a_fault() -> None:
    ring = _ring()
    ring.publish(8)
    with pytest.raises(QueueFault):
        ring.device().pop()


@pytest.mark.parametrize(
    ("address", "length", "flags"),
    [
        (_SIZE, 1, 0),
        (_SIZE - 1, 2, 0),
        (0, 0xFFFF_FFFF, 0),
        (2**64 - 1, 2, WRITE),
        (2**64 - 16, 16, INDIRECT),
        (_SIZE - 16, 32, INDIRECT),
    ],
)
def test_a_descriptor_out_of_memory_is_refused(address: int, length: int, flags: int) -> None:
    ring = _ring()
    queue = ring.device()
    ring.set_descriptor(0, address, length, flags)
    ring.publish(0)
    with pytest.raises(GuestMemoryError):
        queue.pop()


def test_an_indirect_table_counts_only_where_it_was_negotiated() -> None:
    ring = _ring()
    queue = ring.device(indirect=False)
    ring.add([(_DATA, 1)], table=_TABLE)
    with pytest.raises(QueueFault):
        queue.pop()


@pytest.mark.parametrize(("count", "fits"), [(63, True), (64, False)])
def test_a_chain_is_less_than_4_gib(count: int, fits: bool) -> None:
    size = 64 << 20
    memory = GuestMemory([(0, memoryview(bytearray(size)))])
    ring = Ring(memory, 0x1000, 8, event_index=False)
    queue = ring.device()
    ring.add((), [(0, size)] * count, table=_TABLE)
    if fits:
        chain = _take(queue)
        queue.push(chain, chain.writable_size)
        assert ring.used()[0][1] == count * size
    else:
        with pytest.raises(QueueFault, match="bytes"):
            queue.pop()


def test_a_driver_cannot_have_more_chains_out_than_the_queue_has_entries() -> None:
    ring = _ring(4)
    queue = ring.device()
    ring.set_descriptor(0, _DATA, 1)
    out = []
    for _ in range(4):
        ring.publish(0)
        out.append(_take(queue))
    ring.publish(0)
    with pytest.raises(QueueFault):
        queue.pop()
    queue.push(out[0])
    _take(queue)


@pytest.mark.parametrize("size", [0, 3, 65536, -4])
def test_a_size_that_no_queue_has_is_refused(size: int) -> None:
    with pytest.raises(QueueFault):
        Virtqueue(_memory(), size=size, descriptors=0, available=0, used=0, event_index=False)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize(("address", "error"), [(1, QueueFault), (2**63, GuestMemoryError)])
def test_a_queue_out_of_place_is_refused(part: int, address: int, error: type[Exception]) -> None:
    places = [0, 0x1000, 0x2000]
    places[part] = address
    descriptors, available, used = places
    with pytest.raises(error):
        Virtqueue(
            _memory(),
            size=8,
            descriptors=descriptors,
            available=available,
            used=used,
            event_index=True,
        )


# --- anything at all ---

_word = st.sampled_from([0, 1, 2, 7, 8, 0x100, 0xFFFF])
_flags = st.integers(0, 7) | st.integers(0, 0xFFFF)
_address = st.sampled_from([0, 0x1000, _DATA, _TABLE, _SIZE - 16, _SIZE, 2**64 - 1])
_length = st.sampled_from([0, 1, 16, 32, 0x100, 16 * 1025, _SIZE, 2**32 - 16, 2**32 - 1])
_descriptor = st.builds(pack_descriptor, _address, _length, _flags, _word)


@given(
    table=st.lists(_descriptor, min_size=8, max_size=8),
    indirect=st.lists(_descriptor, min_size=4, max_size=4),
    rings=st.lists(st.tuples(st.integers(0, 0x100), _word), max_size=30),
    event_index=st.booleans(),
)
def test_a_hostile_ring_gives_chains_inside_the_memory_or_faults(
    table: list[bytes],
    indirect: list[bytes],
    rings: list[tuple[int, int]],
    event_index: bool,
) -> None:
    ring = _ring(event_index=event_index)
    queue = ring.device()
    ring.memory.write(ring.descriptors, b"".join(table))
    ring.memory.write(_TABLE, b"".join(indirect))
    for head in (0, 1, 2):
        ring.publish(head)
    for step in range(40):
        if step < len(rings):
            offset, value = rings[step]
            ring.set_u16(ring.available + offset % (ring.end - ring.available - 1), value)
        try:
            chain = queue.pop()
        except (QueueFault, GuestMemoryError):
            continue
        if chain is not None:
            assert 0 <= chain.head < ring.size
            assert chain.readable or chain.writable
            assert 0 < chain.readable_size + chain.writable_size < 1 << 32
            assert all(0 < len(view) <= _SIZE for view in chain.readable + chain.writable)
            queue.push(chain, chain.writable_size)
        queue.should_interrupt()
        queue.enable_kicks()
        queue.disable_kicks()


@given(data=st.binary(min_size=0x200, max_size=0x200), base=st.integers(0, 12))
def test_a_queue_laid_over_itself_is_harmless(data: bytes, base: int) -> None:
    memory = GuestMemory([(0, memoryview(bytearray(data)))])
    queue = Virtqueue(
        memory, size=4, descriptors=0, available=4 * base, used=8 * base, event_index=True
    )
    for _ in range(20):
        try:
            chain = queue.pop()
        except (QueueFault, GuestMemoryError):
            break
        if chain is None:
            break
        for view in chain.writable:
            view[:] = b"\xff" * len(view)
        queue.push(chain, chain.writable_size)
