"""vsock over a virtio device's queues: streams as on any carrier, and drivers that mean harm."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine._util.nursery import open_flat_nursery
from trio_supermachine.devices.virtqueue import QueueFault
from trio_supermachine.devices.vsock import VsockDevice
from trio_supermachine.vsock.carrier import Carrier, Packets
from trio_supermachine.vsock.connection import WINDOW
from trio_supermachine.vsock.muxer import MAX_CONTROL
from trio_supermachine.vsock.packet import (
    HEADER,
    HEADER_SIZE,
    MAX_PAYLOAD,
    Op,
    Packet,
    PacketDecoder,
)
from trio_supermachine.vsock.stream import VsockListener, VsockMux, VsockStream

from ..support.device_driver import Driver
from ..support.vsock_ends import DATA, exchange

PORT = 1028
RX, TX, EVENT = range(3)
#: What Linux gives for rx: a header and 4 KiB.
RX_BUFFER = HEADER_SIZE + 4096


def make_driver(device: VsockDevice) -> Driver:
    return Driver(device, RX_BUFFER, HEADER_SIZE + MAX_PAYLOAD, 64)


class DriverCarrier(Carrier):
    """A muxer in the guest's part: its packets pass a driver's side of the queues."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.rx, self.tx, _ = driver.queues

    def attach(self, mux: Packets) -> None:
        self.mux = mux

    def flush(self) -> None:
        core = self.mux.core
        for _ in self.tx.used():
            pass
        while core.has_output and self.tx.free:
            header, payload = core.pull(MAX_PAYLOAD)
            self.tx.add(readable=[header, payload] if payload else [header])
        self.tx.kick()
        self.mux.pulled()

    async def serve(self) -> None:
        self.fill()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._flush_loop)
            while True:
                for buffer, written in await self.rx.wait_used():
                    (packet,) = PacketDecoder().feed(buffer.written[:written])
                    connection = self.mux.core.receive(packet)
                    if connection is not None:
                        self.mux.touched(connection)
                self.fill()
                self.flush()

    async def _flush_loop(self) -> None:
        while True:
            await self.tx.interrupted.wait()
            self.flush()

    def fill(self) -> None:
        while self.rx.free:
            self.rx.add(writable=[RX_BUFFER])
        self.rx.kick()

    def quiet(self) -> AbstractAsyncContextManager[None]:
        raise NotImplementedError

    def reset_peer(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


@attrs.define
class Ends:
    """A host over a device, and a guest over its driver that listens on :data:`PORT`."""

    host: VsockMux
    guest: VsockMux
    listener: VsockListener
    driver: Driver
    nursery: trio.Nursery
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    ended: trio.Event = attrs.Factory(trio.Event)

    async def connect(self) -> tuple[VsockStream, VsockStream]:
        dialed = await self.host.dial(PORT)
        return dialed, await self.listener.accept()

    async def clogged(self) -> tuple[VsockStream, VsockStream]:
        pair = await self.connect()
        for stream in pair:
            await stream.send_all(bytes(WINDOW))
        return pair

    async def go_on(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        with self.scope:
            await self.driver.run()
        self.ended.set()

    async def pause(self) -> None:
        self.scope.cancel()
        await self.ended.wait()
        assert self.driver.left_over == [0, 0, 0]


@pytest.fixture
async def ends(nursery: trio.Nursery) -> AsyncIterator[Ends]:
    device = VsockDevice()
    driver = make_driver(device)
    host = VsockMux(device)
    guest = VsockMux(DriverCarrier(driver), local_cid=3, peer_cid=2)
    ends = Ends(host, guest, guest.listen(PORT), driver, nursery)
    for task in (host.run, guest.run, ends.go_on):
        nursery.start_soon(task)
    yield ends
    host.close()
    guest.close()
    ends.scope.cancel()


async def test_they_pass_trios_own_checks(ends: Ends) -> None:
    await trio.testing.check_half_closeable_stream(ends.connect, ends.clogged)


async def test_both_ways_at_once_with_packets_as_large_as_their_buffers(ends: Ends) -> None:
    await exchange(*await ends.connect())


async def test_the_driver_hears_together_of_packets_that_were_taken_from_it(
    ends: Ends, autojump_clock: trio.testing.MockClock
) -> None:
    _, two = await ends.connect()
    tx = ends.driver.queues[TX]
    await trio.sleep(1)
    told = tx.interrupts
    for _ in range(31):
        await two.send_all(b"x")
    await trio.testing.wait_all_tasks_blocked()
    assert tx.interrupts == told
    await trio.sleep(1)
    assert tx.interrupts == told + 1
    for _ in range(64):
        await two.send_all(b"x")
    await trio.testing.wait_all_tasks_blocked()
    assert tx.interrupts == told + 3
    await trio.sleep(1)
    assert tx.interrupts == told + 3
    # Of what fills a socket's buffer it hears at once.
    await two.send_all(bytes(64 * 1024))
    await trio.testing.wait_all_tasks_blocked()
    assert tx.interrupts > told + 3


async def test_what_was_taken_before_a_pause_is_told_after_it(
    ends: Ends, autojump_clock: trio.testing.MockClock
) -> None:
    _, two = await ends.connect()
    tx = ends.driver.queues[TX]
    await trio.sleep(1)
    told = tx.interrupts
    await two.send_all(b"x")
    await trio.testing.wait_all_tasks_blocked()
    await ends.pause()
    await trio.sleep(1)
    assert tx.interrupts == told
    ends.nursery.start_soon(ends.go_on)
    await trio.sleep(1)
    assert tx.interrupts == told + 1


async def test_a_pause_loses_nothing(ends: Ends) -> None:
    one, two = await ends.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exchange, one, two)
        for _ in range(20):
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            await ends.pause()
            ends.nursery.start_soon(ends.go_on)


async def test_users_go_on_through_a_pause(ends: Ends) -> None:
    one, two = await ends.connect()
    await ends.pause()
    await one.send_eof()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends.host.dial, PORT)
        await trio.testing.wait_all_tasks_blocked()
        ends.nursery.start_soon(ends.go_on)
        await ends.listener.accept()
    assert await two.receive_some() == b""


async def test_in_a_quiet_block_no_packet_moves(ends: Ends) -> None:
    one, two = await ends.connect()
    async with ends.host.quiet():
        await trio.testing.wait_all_tasks_blocked()
        before = [queue.device.queue.save() for queue in ends.driver.queues]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send_all, b"to the guest")
            nursery.start_soon(two.send_all, b"to the host")
            await trio.testing.wait_all_tasks_blocked()
            assert before == [queue.device.queue.save() for queue in ends.driver.queues]
            nursery.cancel_scope.cancel()
    assert await one.receive_some() == b"to the host"
    await one.send_all(b"x")
    assert (await two.receive_some()).endswith(b"x")


async def test_a_reset_by_the_driver_breaks_connections_and_leaves_listeners(ends: Ends) -> None:
    one, two = await ends.connect()
    listener = ends.host.listen(5)
    await two.send_all(b"too late")
    await trio.testing.wait_all_tasks_blocked()
    await ends.pause()
    ends.driver.device.reset()
    with pytest.raises(trio.BrokenResourceError):
        await one.send_all(b"x")
    assert await one.receive_some() == b"too late"
    with pytest.raises(trio.BrokenResourceError, match="reset"):
        await one.receive_some()
    ends.nursery.start_soon(ends.go_on)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends.guest.dial, 5)
        await listener.accept()


async def test_the_configuration_is_the_guests_cid_and_then_zeros() -> None:
    device = VsockDevice(guest_cid=77)
    assert device.read_config(0, 8) == struct.pack("<Q", 77)
    assert device.read_config(1, 2) == device.read_config(6, 4)[:2] == b"\0\0"
    assert device.read_config(4096, 8) == bytes(8)
    for cid in (0, 1, 2, 0xFFFF_FFFF):
        with pytest.raises(ValueError, match="reserved"):
            VsockDevice(guest_cid=cid)


# --- the driver's part by hand ---


@asynccontextmanager
async def by_hand(device: VsockDevice | None = None) -> AsyncIterator[tuple[VsockMux, Driver]]:
    """A host that listens on :data:`PORT`, and its device's driver."""
    device = device or VsockDevice()
    mux = VsockMux(device)
    mux.listen(PORT)
    driver = make_driver(device)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mux.run)
        async with driver.running():
            yield mux, driver
        mux.close()


def say(driver: Driver, op: int, payload: bytes = b"", **fields: int) -> None:
    """One packet to :data:`PORT`, or whatever ``fields`` make of it."""
    header = HEADER.pack(
        *(
            fields.get(name, default)
            for name, default in (
                ("src_cid", 3),
                ("dst_cid", 2),
                ("src_port", 9),
                ("dst_port", PORT),
                ("length", len(payload)),
                ("kind", 1),
            )
        ),
        op,
        fields.get("flags", 0),
        fields.get("window", WINDOW),
        fields.get("taken", 0),
    )
    driver.queues[TX].add(readable=[header, payload] if payload else [header])
    driver.queues[TX].kick()


def give(driver: Driver, count: int = 1, size: int = RX_BUFFER) -> None:
    for _ in range(min(count, driver.queues[RX].free)):
        driver.queues[RX].add(writable=[size])
    driver.queues[RX].kick()


async def hear(driver: Driver) -> list[Packet]:
    found: list[Packet] = []
    for buffer, written in await driver.queues[RX].wait_used():
        found += PacketDecoder().feed(buffer.written[:written])
    return found


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"src_cid": 4}, id="another source"),
        pytest.param({"dst_cid": 1 << 63}, id="another destination"),
        pytest.param({"kind": 2}, id="SEQPACKET"),
        pytest.param({"op": 0}, id="invalid operation"),
        pytest.param({"op": Op.FREEZE}, id="an operation of serial carriers"),
        pytest.param({"op": 0xFFFF}, id="unknown operation"),
        pytest.param({"length": 1}, id="longer than its chain"),
        pytest.param({"length": 0xFFFF_FFFF}, id="oversized"),
        pytest.param({"dst_port": 77}, id="nobody's port"),
        pytest.param({"op": Op.RW}, id="no connection"),
    ],
)
async def test_what_is_wrong_with_a_packet_is_answered_by_a_reset(fields: dict[str, int]) -> None:
    async with by_hand() as (_, driver):
        give(driver, 2)
        header: dict[str, Any] = {"op": Op.REQUEST, **fields}
        say(driver, **header)
        (answer,) = await hear(driver)
        assert answer.op is Op.RST
        assert (answer.src_cid, answer.src_port) == (
            fields.get("dst_cid", 2),
            fields.get("dst_port", PORT),
        )
        assert (answer.dst_cid, answer.dst_port) == (3, 9)
        say(driver, Op.REQUEST)
        assert [p.op for p in await hear(driver)] == [Op.RESPONSE]


async def test_a_payload_may_be_cut_into_any_descriptors_and_be_followed_by_more() -> None:
    async with by_hand() as (mux, driver):
        listener = mux._listeners[PORT]
        give(driver)
        say(driver, Op.REQUEST)
        stream = await listener.accept()
        header = HEADER.pack(3, 2, 9, PORT, 6, 1, Op.RW, 0, WINDOW, 0)
        tx = driver.queues[TX]
        tx.add(readable=[header + b"abcdef"])
        tx.add(readable=[header + b"ab", b"cdef", b"beyond"])
        tx.add(readable=[header[:10], header[10:43], header[43:] + b"a", b"bcde", b"f"])
        tx.add(readable=[header, b"abcdefghi"])
        tx.kick()
        got = b""
        while len(got) < 24:
            got += await stream.receive_some()
        assert got == b"abcdef" * 4


@pytest.mark.parametrize("size", [1, 43])
async def test_a_chain_without_a_header_is_the_drivers_fault(size: int) -> None:
    device = VsockDevice()
    VsockMux(device)
    driver = make_driver(device)
    driver.queues[TX].add(readable=[bytes(size)])
    with pytest.raises(QueueFault, match="header"):
        await driver.run()


async def test_an_rx_buffer_without_room_is_the_drivers_fault_and_not_the_streams() -> None:
    device = VsockDevice()
    mux = VsockMux(device)
    driver = make_driver(device)
    give(driver, size=HEADER_SIZE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mux.run)
        with pytest.raises(QueueFault, match="room"):
            async with open_flat_nursery() as users:
                users.start_soon(driver.run)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(_refused, mux)
        mux.close()


async def test_several_faults_at_once_are_one() -> None:
    device = VsockDevice()
    mux = VsockMux(device)
    device.load(some_state())
    driver = make_driver(device)
    for queue in driver.queues:
        queue.add(readable=[b"nonsense"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mux.run)
        nursery.start_soon(_refused, mux)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):
            with pytest.raises(QueueFault):
                await driver.run()
            device.reset()
            for queue in driver.queues:
                queue.add(readable=[b"nonsense"])
        mux.close()


async def test_tiny_rx_buffers_carry_tiny_packets() -> None:
    async with by_hand() as (mux, driver):
        listener = mux._listeners[PORT]
        give(driver)
        say(driver, Op.REQUEST)
        stream = await listener.accept()
        await hear(driver)
        for _ in range(4):
            driver.queues[RX].add(writable=[40, 4, 1])
        driver.queues[RX].kick()
        await stream.send_all(b"bye!")
        assert [bytes(p.payload) for p in await hear(driver)] == [b"b", b"y", b"e", b"!"]


async def test_a_driver_that_never_gives_rx_buffers_is_not_listened_to_without_end() -> None:
    async with by_hand() as (_, driver):
        tx = driver.queues[TX]
        said = 0
        while True:
            while tx.free:
                say(driver, Op.RW, src_port=said, dst_port=77)
                said += 1
            await trio.testing.wait_all_tasks_blocked()
            if not tx.used():
                break
            assert said < 2 * MAX_CONTROL
        assert said >= MAX_CONTROL
        give(driver, 100)
        await hear(driver)
        await tx.wait_used()


async def test_a_guest_that_lies_about_its_credit_loses_the_connection() -> None:
    async with by_hand() as (mux, driver):
        listener = mux._listeners[PORT]
        give(driver, 2)
        say(driver, Op.REQUEST)
        stream = await listener.accept()
        assert [p.op for p in await hear(driver)] == [Op.RESPONSE]
        say(driver, Op.CREDIT_UPDATE, taken=1000)
        assert [p.op for p in await hear(driver)] == [Op.RST]
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


async def test_a_sender_with_all_the_credit_in_the_world_waits_for_buffers() -> None:
    async with by_hand() as (mux, driver):
        listener = mux._listeners[PORT]
        give(driver)
        say(driver, Op.REQUEST, window=0xFFFF_FFFF)
        stream = await listener.accept()
        await hear(driver)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, DATA)
            got = b""
            while len(got) < len(DATA):
                give(driver, 100)
                got += b"".join(bytes(p.payload) for p in await hear(driver))
        assert got == DATA


_noise = st.tuples(
    st.sampled_from([3, 3, 3, 2, 2**64 - 1]),
    st.sampled_from([2, 2, 2, 3, 0]),
    st.integers(9, 11),
    st.sampled_from([PORT, PORT, 77]),
    st.sampled_from([0, 0, 5, 4096, 2**32 - 1]),
    st.sampled_from([1, 1, 1, 2, 0]),
    st.sampled_from([*range(9), 16, 17, 0xFFFF]),
    st.integers(0, 3),
    st.sampled_from([0, 10, WINDOW, 2**32 - 1]),
    st.sampled_from([0, 1, 2**31, 2**32 - 1]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_noise, st.sampled_from([0, 5, 4096, 65536])), max_size=40))
def test_noise_costs_connections_and_nothing_else(
    noise: list[tuple[tuple[int, ...], int]],
) -> None:
    async def main() -> None:
        async with by_hand() as (mux, driver):
            tx = driver.queues[TX]
            for fields, size in noise:
                header = HEADER.pack(*fields)
                tx.add(readable=[header, bytes(size)] if size else [header])
            tx.kick()
            give(driver, 100)
            await trio.testing.wait_all_tasks_blocked()
            assert len(tx.used()) == len(noise)
            assert sum(c.buffered for c in mux.core._connections.values()) <= 3 * WINDOW
            driver.queues[RX].used()
            say(driver, Op.REQUEST, src_port=4000)
            give(driver, 100)
            while (Op.RESPONSE, 4000) not in [(p.op, p.dst_port) for p in await hear(driver)]:
                pass

    trio.run(main)


# --- restores ---


def some_state() -> bytes:
    device = VsockDevice()
    VsockMux(device)
    return device.save()


async def test_a_restored_guest_is_told_first_and_hears_nothing_until_it_has_dealt_with_it() -> (
    None
):
    before = VsockDevice()
    old = VsockMux(before)
    used_port = old.core.dial(PORT).local_port
    device = VsockDevice()
    mux = VsockMux(device)
    device.load(before.save())
    driver = make_driver(device)
    rx, _, events = driver.queues
    give(driver, 4)
    for _ in range(8):
        events.add(writable=[4])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mux.run)
        async with driver.running():
            nursery.start_soon(_refused, mux)
            (said, written), *others = await events.wait_used()
            assert (said.written, written) == (bytes(4), 4)
            assert [written for _, written in others] == [0] * 7
            await trio.testing.wait_all_tasks_blocked()
            assert not rx.used()
            events.add(writable=[4])
            events.kick()
            (request,) = await hear(driver)
            assert request.op is Op.REQUEST
            assert request.src_port != used_port
            assert [written for _, written in await events.wait_used()] == [0]
            events.add(writable=[4])
            await trio.testing.wait_all_tasks_blocked()
            assert not events.used()
        mux.close()


async def _refused(mux: VsockMux) -> None:
    with pytest.raises(trio.BrokenResourceError):
        await mux.dial(PORT)


async def test_the_event_is_said_once_however_often_the_device_is_paused() -> None:
    device = VsockDevice()
    mux = VsockMux(device)
    device.load(some_state())
    driver = make_driver(device)
    rx, _, events = driver.queues
    give(driver, 2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mux.run)
        nursery.start_soon(_refused, mux)
        async with driver.running():
            await trio.testing.wait_all_tasks_blocked()  # no buffer for it yet
        events.add(writable=[2, 2])
        async with driver.running():
            ((buffer, _),) = await events.wait_used()
            assert buffer.written == bytes(4)
        assert not rx.used()
        async with driver.running():
            await trio.testing.wait_all_tasks_blocked()
            assert not rx.used()
            events.add(writable=[4])
            events.kick()
            assert [p.op for p in await hear(driver)] == [Op.REQUEST]
            assert [written for _, written in events.used()] == [0]
        mux.close()


async def test_a_driver_that_begins_anew_after_a_restore_has_nothing_to_be_told() -> None:
    device = VsockDevice()
    mux = VsockMux(device)
    device.load(some_state())
    device.reset()
    driver = make_driver(device)
    driver.queues[EVENT].add(writable=[4])
    give(driver)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mux.run)
        nursery.start_soon(_refused, mux)
        async with driver.running():
            assert [p.op for p in await hear(driver)] == [Op.REQUEST]
            assert not driver.queues[EVENT].used()
        mux.close()


@pytest.mark.parametrize("state", [b"", bytes(4), bytes(5)])
async def test_what_is_no_state_is_refused(state: bytes) -> None:
    device = VsockDevice()
    VsockMux(device)
    with pytest.raises(ValueError, match="vsock"):
        device.load(state)


async def test_an_event_buffer_without_room_is_the_drivers_fault() -> None:
    device = VsockDevice()
    VsockMux(device)
    device.load(some_state())
    driver = make_driver(device)
    driver.queues[EVENT].add(writable=[3])
    with pytest.raises(QueueFault, match="event"):
        await driver.run()
