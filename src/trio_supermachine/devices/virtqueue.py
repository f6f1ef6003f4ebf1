"""The device's side of a split virtqueue (virtio 1.2 §2.7), without I/O.

Theory of operation. The queue is three tables in guest memory: *descriptors* (address, length,
flags, next), the *available* ring, in which the driver puts heads of chains, and the *used* ring,
in which the device gives them back. Each side only ever writes its own ring and reads the other's.
Indices run freely, modulo 2**16.

- :meth:`Virtqueue.pop` takes the next head and follows its descriptors to a :class:`Chain`.
- :meth:`Virtqueue.push` writes the used element first and the index behind it, so that a driver
  that sees the index finds the element.
- Notifications are suppressed in both directions, by flags or by event indices (§2.7.7, §2.7.10). A
  side that says "wake me" and then finds nothing may have said it too late. So
  :meth:`Virtqueue.enable_kicks` looks once more, and :meth:`Virtqueue.should_interrupt` decides
      after a barrier.

*Memory order.* Shared fields are accessed through casts of a memoryview, which are single loads and
stores, in the order of the program. x86 keeps that order for all but a load behind a store to
another place, for which there is :func:`_fence`.

*A hostile driver* may write anything anywhere at any time. So ``pop`` reads each field once, checks
it, and gives out views that are inside guest memory by construction: devices never see a
descriptor. Loops, chains longer than the queue, indirect tables inside of indirect tables and
descriptors of no bytes are faults. The work of one ``pop`` is bounded by :data:`MAX_INDIRECT` and
the queue's size, and the chains that are out by the queue's size. The *contents* of a chain may
still change under the device's hands: copy, then check.

*A queue that goes on from a snapshot* does not know whether its last interrupt reached the driver.
It interrupts once too often.
"""

from __future__ import annotations

import struct
import threading
from typing import Final, final

import attrs

from .memory import GuestMemory

#: The largest queue of the split format.
MAX_QUEUE_SIZE: Final = 32768
#: Descriptors that an indirect table may have. It may be longer than the queue: Linux makes it as
#: long as the device's own limit of segments allows.
MAX_INDIRECT: Final = 1024
#: Bytes that one chain may have: the most that the used ring can say was written. (§2.7.5.2 allows
#: one more.)
MAX_CHAIN_BYTES: Final = (1 << 32) - 1

DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4
AVAIL_F_NO_INTERRUPT: Final = 1
USED_F_NO_NOTIFY: Final = 1

# Address, length, flags, next.
_DESCRIPTOR: Final = struct.Struct("<QIHH")

# Both rings as 16-bit words begin with their flags and their index.
_FLAGS: Final = 0
_INDEX: Final = 1
_RING: Final = 2


class QueueFault(Exception):
    """Breach of a queue's rules by the driver; only a reset of the device mends it."""


@attrs.frozen
class QueueState:
    """State of a queue: its free-running indices of 16 bits."""

    next_available: int = 0
    next_used: int = 0


@final
@attrs.define(eq=False)  # not frozen: that doubles the time it takes to make one
class Chain:
    """One buffer that the driver made available; every view is inside the guest's memory.

    The contents may change under the device's hands: copy, then check.

    :ivar head: the number that the driver knows it by.
    :ivar readable: parts that the device may read, in order; none is empty.
    :ivar writable: parts that the device may write, in order; none is empty.
    """

    head: int
    readable: tuple[memoryview, ...]
    writable: tuple[memoryview, ...]

    @property
    def readable_size(self) -> int:
        """Bytes that can be read."""
        return sum(map(len, self.readable))

    @property
    def writable_size(self) -> int:
        """Bytes that can be written."""
        return sum(map(len, self.writable))


_lock: Final = threading.Lock()


def _fence() -> None:
    """Let others see the stores before this, before the loads behind it are made.

    A lock is taken with a locked instruction, which is a full barrier on x86.
    """
    with _lock:
        pass


@final
class Virtqueue:
    """One split virtqueue that the driver has set up.

    At most ``size`` chains are out between :meth:`pop` and :meth:`push`.

    :param size: entries; a power of 2, at most `MAX_QUEUE_SIZE`.
    :param descriptors: guest-physical address of the descriptor table, a multiple of 16.
    :param available: that of the available (driver) ring, a multiple of 2.
    :param used: that of the used (device) ring, a multiple of 4.
    :param event_index: whether VIRTIO_F_EVENT_IDX was negotiated.
    :param indirect: whether VIRTIO_F_INDIRECT_DESC was negotiated.
    :param state: the state of an earlier object, to go on from.
    :raises QueueFault: the driver's size or addresses are not allowed.
    :raises GuestMemoryError: a part of the queue is not in guest memory.
    """

    __slots__ = (
        "_available",
        "_descriptors",
        "_elements",
        "_event_index",
        "_in_doubt",
        "_indirect",
        "_next_available",
        "_next_used",
        "_reported",
        "_size",
        "_used",
        "_view",
    )

    def __init__(
        self,
        memory: GuestMemory,
        *,
        size: int,
        descriptors: int,
        available: int,
        used: int,
        event_index: bool,
        indirect: bool = True,
        state: QueueState | None = None,
    ) -> None:
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise QueueFault(f"a queue of {size} entries")
        if descriptors & 15 or available & 1 or used & 3:
            raise QueueFault("the queue is not aligned")
        self._view = memory.view
        self._size = size
        self._event_index = event_index
        self._indirect = indirect
        self._descriptors = memory.view(descriptors, 16 * size)
        self._available = memory.view(available, 6 + 2 * size).cast("H")
        used_ring = memory.view(used, 6 + 8 * size)
        self._used = used_ring.cast("H")
        # 32-bit pairs: head; bytes written.
        self._elements = used_ring[4 : 4 + 8 * size].cast("I")
        start = state or QueueState()
        self._next_available = start.next_available
        self._next_used = start.next_used
        self._reported = start.next_used
        # The driver may not have been told of everything before.
        self._in_doubt = state is not None

    @property
    def size(self) -> int:
        """Number of entries."""
        return self._size

    def save(self) -> QueueState:
        """Give the state of the queue. Every chain that was popped has been pushed."""
        return QueueState(self._next_available, self._next_used)

    def pop(self) -> Chain | None:
        """Take the next chain; ``None`` if the driver has made none available.

        :raises QueueFault: the driver wrote something that is no chain; nothing was taken.
        :raises GuestMemoryError: a descriptor points out of guest memory; nothing was taken.
        """
        next_available = self._next_available
        size = self._size
        index = self._available[_INDEX]
        if index == next_available:
            return None
        if (index - next_available) & 0xFFFF > size:
            raise QueueFault("more chains are available than the queue has entries")
        if (next_available - self._next_used) & 0xFFFF >= size:
            raise QueueFault("a chain was made available again before it was used")
        head = self._available[_RING + (next_available & (size - 1))]

        table = self._descriptors
        unpack = _DESCRIPTOR.unpack_from
        entries = left = size
        at = head
        view = self._view
        total = 0
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        while True:
            if at >= entries:
                raise QueueFault(f"descriptor {at} of {entries}")
            if not left:
                raise QueueFault("a chain with a loop")
            left -= 1
            address, length, flags, following = unpack(table, 16 * at)
            if flags & DESC_F_INDIRECT:
                if flags & DESC_F_NEXT:
                    raise QueueFault("an indirect descriptor with a next one")
                if table is not self._descriptors or not self._indirect:
                    raise QueueFault("an indirect descriptor where there must be none")
                entries = left = length >> 4
                if length & 15 or not 0 < entries <= MAX_INDIRECT:
                    raise QueueFault(f"an indirect table of {length} bytes")
                table = view(address, length)
                at = 0
                continue
            if not length:
                raise QueueFault("a descriptor of no bytes")
            total += length
            if flags & DESC_F_WRITE:
                writable.append(view(address, length))
            elif writable:
                raise QueueFault("a readable descriptor after a writable one")
            else:
                readable.append(view(address, length))
            if not flags & DESC_F_NEXT:
                break
            at = following
        if total > MAX_CHAIN_BYTES:
            raise QueueFault(f"a chain of {total} bytes")
        self._next_available = (next_available + 1) & 0xFFFF
        return Chain(head, tuple(readable), tuple(writable))

    def push(self, chain: Chain, written: int = 0) -> None:
        """Give a chain back, once.

        :param written: bytes from the start of its writable part that are new.
        """
        next_used = self._next_used
        at = 2 * (next_used & (self._size - 1))
        self._elements[at] = chain.head
        self._elements[at + 1] = written
        self._next_used = next_used = (next_used + 1) & 0xFFFF
        self._used[_INDEX] = next_used

    def should_interrupt(self) -> bool:
        """Tell whether the driver wants to hear of the chains pushed since the last call (§2.7.7).

        The answer is right if those were 65535 at most. The first call on a queue that goes on from
        a state says ``True``.
        """
        reported, next_used = self._reported, self._next_used
        self._reported = next_used
        if self._in_doubt:
            self._in_doubt = False
            return True
        pushed = (next_used - reported) & 0xFFFF
        if not pushed:
            return False
        _fence()
        if self._event_index:
            used_event = self._available[_RING + self._size]
            return (next_used - used_event - 1) & 0xFFFF < pushed
        return not self._available[_FLAGS] & AVAIL_F_NO_INTERRUPT

    def enable_kicks(self) -> bool:
        """Ask the driver to notify of the next chain; ``True`` if there is one (§2.7.10)."""
        if self._event_index:
            self._used[_RING + 4 * self._size] = self._next_available
        else:
            self._used[_FLAGS] = 0
        _fence()
        return self._available[_INDEX] != self._next_available

    def disable_kicks(self) -> None:
        """Ask the driver not to notify for now."""
        # By the event index it notifies once, as it passes that: there is nothing to suppress.
        if not self._event_index:
            self._used[_FLAGS] = USED_F_NO_NOTIFY
