"""The virtio-vsock device (virtio 1.2 §5.10): the carrier that a guest's own kernel speaks.

Theory of operation. A packet is one chain of a queue, and moves between guest memory and a stream's
buffer in one copy. Whole packets are in the queues or in the muxer, so a capture needs no
arrangement with the guest (unlike :mod:`~trio_supermachine.vsock.framing`).

*To the guest.* :meth:`VsockDevice.flush` puts packets into chains of the rx queue, in the very call
that makes them. It stops for one of two reasons, and the rx task takes over: there are no chains,
or 64 packets have been moved and other tasks want their turn.

*From the guest.* The tx task takes chains and hands each packet to the muxer. While the muxer is
congested it takes no more. Chains go back at once, but the driver is told of many together: with
each chain it frees memory and wakes a sender, and interrupts cost both sides much.

*In a pause* ``run`` has ended. The muxer above goes on: what its users send waits in its
connections, as behind a peer without credit. *In a quiet block* both tasks hold back.

*After a restore* the guest must learn that its connections are gone: DUE (the event TRANSPORT_RESET
is to be sent) -> SAID (the guest has it) -> DONE (its kernel has dealt with it, which shows when it
makes an event buffer available again). Nothing is put into the rx queue before DONE: a connection
that is opened earlier would be reset with the old ones.

*A hostile driver* can cost itself a connection by each packet, and stop the device by a chain that
cannot hold a header (:exc:`.QueueFault`). It can make this side store no more than the muxer's
bounds allow: packets stay in guest memory until they are taken.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from typing import ClassVar, Final, final

import trio

from .._util.nursery import open_flat_nursery
from ..vsock.carrier import Carrier, Packets
from ..vsock.connection import Connection
from ..vsock.packet import (
    GUEST_CID,
    HEADER,
    HEADER_SIZE,
    MAX_PAYLOAD,
    STREAM_OPS,
    TYPE_STREAM,
    Packet,
)
from ..vsock.parking import Parking
from .memory import GuestMemoryError
from .virtio import ID_VSOCK, Queue, VirtioDevice
from .virtqueue import Chain, QueueFault

F_STREAM: Final = 1 << 0

#: As vhost's. Linux fills the rx queue with buffers of 4 KiB: twice the window of a connection.
_QUEUE_SIZE: Final = 128
_CONFIG: Final = struct.Struct("<Q")
_STATE: Final = struct.Struct("<I")
_EVENT_TRANSPORT_RESET: Final = struct.pack("<I", 0)
#: Packets handled before other tasks get a turn.
_TURN: Final = 64
#: The driver is told of tx chains that have come back when they have so many bytes together, or so
#: many seconds after the first. By default Linux lets a socket have 208 KiB on their way, counted
#: as generously as here.
_TOLD_TOGETHER: Final = 64 * 1024
_TOLD_AFTER: Final = 0.02
#: Bytes that a packet counts for, beside its own.
_PACKET_COST: Final = 2048


class _Rx(Enum):
    """Reason that no packets are put into the rx queue."""

    NOTHING = "nothing"
    NO_CHAINS = "no chains"
    OTHERS_TURN = "others' turn"


class _PeerReset(Enum):
    """Progress of telling the guest that it was restored."""

    DONE = "done"
    DUE = "due"
    SAID = "said"


@final
class VsockDevice(VirtioDevice, Carrier):
    """A virtio-vsock device, and the carrier of the :class:`.VsockMux` that it is given to.

    The muxer lives as long as the machine; :meth:`run` comes and goes with the driver. A reset
    by the driver breaks every connection and leaves the host's listeners. SEQPACKET is not
    offered: such a packet is answered by RST (§5.10.6).

    :param guest_cid: the guest's context id: 3 or more, and below 2**32 - 1.
    """

    device_id: ClassVar[int] = ID_VSOCK
    queue_sizes: tuple[int, ...] = (_QUEUE_SIZE, _QUEUE_SIZE, _QUEUE_SIZE)
    features = F_STREAM

    def __init__(self, *, guest_cid: int = GUEST_CID) -> None:
        if not GUEST_CID <= guest_cid < 0xFFFF_FFFF:
            raise ValueError(f"{guest_cid} is a reserved vsock CID")
        self._config = _CONFIG.pack(guest_cid)
        self._rx: Queue | None = None
        self._rx_wait = _Rx.NOTHING
        self._rx_task = Parking()
        self._tx_task = Parking()
        self._untold = 0  # bytes taken from the driver that it has not been told of
        self._teller = Parking()
        self._scope = trio.CancelScope()
        self._fault: QueueFault | GuestMemoryError | None = None
        self._peer_reset = _PeerReset.DONE
        self._held = False

    # --- the device ---

    def read_config(self, offset: int, length: int) -> bytes:
        return self._config[offset : offset + length].ljust(length, b"\0")

    async def run(self, queues: Sequence[Queue]) -> None:
        """Move packets until cancelled. The muxer must have been made."""
        rx, tx, events = queues
        self._rx, self._rx_wait, self._fault = rx, _Rx.NOTHING, None
        try:
            async with open_flat_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._guard, self._tx_loop, tx)
                nursery.start_soon(self._guard, self._tell_late, tx)
                nursery.start_soon(self._guard, self._rx_loop, rx)
                if self._peer_reset is not _PeerReset.DONE:
                    nursery.start_soon(self._guard, self._say_reset, events)
            if self._fault is not None:
                raise self._fault
        finally:
            # Nothing may hold a view of guest memory any more, not even a traceback.
            self._rx = self._fault = None

    async def _guard(self, serve: Callable[[Queue], Awaitable[None]], queue: Queue) -> None:
        try:
            await serve(queue)
        except (QueueFault, GuestMemoryError) as exc:
            self._fail(exc)

    def _fail(self, fault: QueueFault | GuestMemoryError) -> None:
        """End :meth:`run` by a fault of the driver; the first one, if there are several."""
        self._fault = self._fault or fault
        self._scope.cancel()

    def reset(self) -> None:
        self._peer_reset = _PeerReset.DONE
        for connection in self._mux.core.forget_peer():
            self._mux.touched(connection)

    def save(self) -> bytes:
        return _STATE.pack(self._mux.core.next_port)

    def load(self, state: bytes) -> None:
        if len(state) != _STATE.size:
            raise ValueError(f"a vsock device's state of {len(state)} bytes")
        # Ports go on where they were: a guest that has not heard of its restore yet must not take a
        # new connection for an old one.
        (self._mux.core.next_port,) = _STATE.unpack(state)
        self.reset_peer()

    # --- the carrier ---

    def attach(self, mux: Packets) -> None:
        self._mux = mux

    async def serve(self) -> None:
        await trio.sleep_forever()

    def reset_peer(self) -> None:
        """Send the event TRANSPORT_RESET (§5.10.6.7) in the next :meth:`run`, once.

        Packets to the guest wait until it has dealt with the event.
        """
        self._peer_reset = _PeerReset.DUE

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        self._mux.check_alive()
        await trio.lowlevel.checkpoint()
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._tx_task.wake()
            self.flush()

    def close(self) -> None:
        self._held = False
        self._tx_task.wake()

    def flush(self) -> None:
        rx = self._rx
        if rx is not None and self._rx_wait is _Rx.NOTHING and self._fault is None:
            try:
                self._fill(rx)
            except (QueueFault, GuestMemoryError) as exc:
                self._fail(exc)  # in ``run``: the caller may be any user of a stream
            if self._rx_wait is not _Rx.NOTHING:
                self._rx_task.wake()
        if not self._mux.core.congested:
            self._tx_task.wake()

    # --- to the guest ---

    async def _rx_loop(self, rx: Queue) -> None:
        while True:
            if self._rx_wait is _Rx.NOTHING:
                self.flush()
            if self._rx_wait is _Rx.NOTHING:
                await self._rx_task.park()
            if self._rx_wait is _Rx.NO_CHAINS:
                await rx.wait()
            elif self._rx_wait is _Rx.OTHERS_TURN:
                await trio.lowlevel.checkpoint()
            self._rx_wait = _Rx.NOTHING

    def _fill(self, rx: Queue) -> None:
        """Put packets into chains until either runs out, or it is other tasks' turn."""
        if self._held or self._peer_reset is not _PeerReset.DONE:
            return
        core = self._mux.core
        left = _TURN
        try:
            while core.has_output:
                if not left:
                    self._rx_wait = _Rx.OTHERS_TURN
                    break
                chain = rx.pop()
                if chain is None:
                    self._rx_wait = _Rx.NO_CHAINS
                    break
                left -= 1
                writable = chain.writable
                room = (
                    len(writable[0]) if len(writable) == 1 else chain.writable_size
                ) - HEADER_SIZE
                if room < 1:
                    raise QueueFault("an rx buffer with no room for a packet")
                header, payload = core.pull(room)
                first = writable[0]
                end = HEADER_SIZE + len(payload)
                if end <= len(first):
                    first[:HEADER_SIZE] = header
                    if payload:
                        first[HEADER_SIZE:end] = payload
                else:
                    _scatter(b"".join((header, payload)), writable)
                rx.push(chain, end)
        finally:
            if left < _TURN:
                rx.interrupt()
            self._mux.pulled()

    # --- from the guest ---

    async def _tx_loop(self, tx: Queue) -> None:
        mux = self._mux
        core = mux.core
        while True:
            await tx.wait()
            left = _TURN
            while True:
                while self._held or core.congested:
                    self._tell(tx)
                    self.flush()
                    if self._held or core.congested:
                        await self._tx_task.park()
                chain = tx.pop()
                if chain is None:
                    break
                connection = self._receive(chain)
                self._untold += _PACKET_COST + chain.readable_size
                tx.push(chain)
                del chain
                if connection is not None:
                    mux.touched(connection)
                if self._untold >= _TOLD_TOGETHER:
                    self._tell(tx)
                left -= 1
                if not left:
                    self.flush()
                    await trio.lowlevel.checkpoint()
                    left = _TURN
            self._teller.wake()
            if core.has_output:
                self.flush()

    async def _tell_late(self, tx: Queue) -> None:
        """Tell the driver of chains that it has not been told of for a while."""
        while True:
            if self._untold:
                await trio.sleep(_TOLD_AFTER)
                self._tell(tx)
            else:
                await self._teller.park()

    def _tell(self, tx: Queue) -> None:
        tx.interrupt()
        self._untold = 0

    def _receive(self, chain: Chain) -> Connection | None:
        views = chain.readable
        data: memoryview | bytes
        if views and len(views[0]) >= HEADER_SIZE:
            header = HEADER.unpack_from(views[0])
            if len(views) == 1:
                data = views[0][HEADER_SIZE:]
            elif len(views) == 2 and len(views[0]) == HEADER_SIZE:
                data = views[1]
            else:
                data = _gather(views, HEADER_SIZE + MAX_PAYLOAD)[HEADER_SIZE:]
        else:
            whole = _gather(views, HEADER_SIZE + MAX_PAYLOAD)
            if len(whole) < HEADER_SIZE:
                raise QueueFault("a tx chain without a whole header")
            header = HEADER.unpack_from(whole)
            data = whole[HEADER_SIZE:]
        src_cid, dst_cid, src_port, dst_port, length, kind, number, flags, window, taken = header
        op = STREAM_OPS.get(number)
        if op is None or kind != TYPE_STREAM or length > MAX_PAYLOAD or length > len(data):
            return self._mux.core.refuse(src_cid, dst_cid, src_port, dst_port)
        if length != len(data):
            data = data[:length]
        return self._mux.core.receive(
            Packet(src_cid, dst_cid, src_port, dst_port, op, flags, window, taken, data)
        )

    # --- events ---

    async def _say_reset(self, events: Queue) -> None:
        """Send TRANSPORT_RESET and wait until the guest has dealt with it.

        It has when it makes a buffer available again. To see that one, this empties the queue
        first: the other buffers go back at once, without an event.
        """
        if self._peer_reset is _PeerReset.DUE:
            while (chain := events.pop()) is None:
                await events.wait()
            if chain.writable_size < len(_EVENT_TRANSPORT_RESET):
                raise QueueFault("an event buffer with no room for an event")
            _scatter(_EVENT_TRANSPORT_RESET, chain.writable)
            events.push(chain, len(_EVENT_TRANSPORT_RESET))
            for _ in range(self.queue_sizes[2]):
                if (chain := events.pop()) is None:
                    break
                events.push(chain)
            self._peer_reset = _PeerReset.SAID
            events.interrupt()
        while (chain := events.pop()) is None:
            await events.wait()
        events.push(chain)
        events.interrupt()
        self._peer_reset = _PeerReset.DONE
        self.flush()


def _gather(views: Sequence[memoryview], limit: int) -> bytes:
    """Copy the first ``limit`` bytes of ``views``."""
    parts = []
    for view in views:
        parts.append(view[:limit])
        limit -= len(parts[-1])
        if not limit:
            break
    return b"".join(parts)


def _scatter(data: bytes, views: Sequence[memoryview]) -> None:
    """Copy ``data`` over ``views``, which have room for it."""
    at = 0
    for view in views:
        part = data[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)
        if at == len(data):
            return
