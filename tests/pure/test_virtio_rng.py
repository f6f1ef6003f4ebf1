"""The entropy device gives random bytes, a bounded number of them, and others their turns."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from trio_supermachine.devices.rng import RngDevice
from trio_supermachine.devices.virtqueue import QueueFault

from ..support.device_driver import Driver


async def test_every_byte_is_random_and_counted() -> None:
    driver = Driver(RngDevice(), 2000)
    (queue,) = driver.queues
    async with driver.running():
        one, other = queue.add(writable=[64]), queue.add(writable=[1, 900, 99])
        queue.kick()
        used = dict(await queue.wait_used())
    assert used == {one: 64, other: 1000}
    assert one.written != other.written[:64]
    assert len(set(other.written)) > 200


async def test_a_chain_gets_so_much_and_no_more() -> None:
    driver = Driver(RngDevice(), 1 << 20)
    (queue,) = driver.queues
    async with driver.running():
        buffer = queue.add(writable=[4000, 4000, 1 << 19])
        queue.kick()
        assert await queue.wait_used() == [(buffer, 4096)]
    assert not any(buffer.written[4096:])


async def test_a_request_without_room_is_the_drivers_fault() -> None:
    driver = Driver(RngDevice(), 64)
    driver.queues[0].add(readable=[b"give me some"])
    with pytest.raises(QueueFault, match="room"):
        await driver.run()


async def test_a_driver_that_never_stops_asking_does_not_starve_other_tasks() -> None:
    driver = Driver(RngDevice(), 64)
    (queue,) = driver.queues
    queue.add(writable=[64])
    pop = queue.device.pop
    turns = 0

    def refilled() -> object:
        for _ in queue.used():
            queue.add(writable=[64])
        return pop()

    queue.device.pop = refilled  # type: ignore[method-assign, assignment]
    async with driver.running():
        for _ in range(100):
            await trio.lowlevel.checkpoint()
            turns += 1
    assert turns == 100
    assert driver.left_over == [0]


async def test_it_serves_again_after_a_pause() -> None:
    driver = Driver(RngDevice(), 64)
    (queue,) = driver.queues
    for _ in range(3):
        async with driver.running():
            await trio.testing.wait_all_tasks_blocked()
        queue.add(writable=[8])
        queue.kick()
        async with driver.running():
            ((_, written),) = await queue.wait_used()
        assert written == 8
