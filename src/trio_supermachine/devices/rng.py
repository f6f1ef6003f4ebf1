"""The entropy device (virtio 1.2 §5.4)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar, Final, final

import trio

from .virtio import ID_ENTROPY, Queue, VirtioDevice
from .virtqueue import QueueFault

#: Bytes that one chain gets at most; the driver asks again for more (§5.4.6.2).
_LARGEST: Final = 4096
#: Chains served before other tasks get a turn.
_TURN: Final = 16


@final
class RngDevice(VirtioDevice):
    """A virtio-rng device: random bytes of the host's kernel.

    A driver that asks for ever gets a bounded share: other tasks have their turns in between.
    """

    device_id: ClassVar[int] = ID_ENTROPY
    queue_sizes: tuple[int, ...] = (8,)

    async def run(self, queues: Sequence[Queue]) -> None:
        (queue,) = queues
        while True:
            await queue.wait()
            left = _TURN
            while (chain := queue.pop()) is not None:
                if not chain.writable:
                    raise QueueFault("a request for random bytes without room for them")
                given = 0
                for view in chain.writable:
                    size = min(len(view), _LARGEST - given)
                    view[:size] = os.getrandom(size)
                    given += size
                    if given == _LARGEST:
                        break
                queue.push(chain, given)
                left -= 1
                if not left:
                    queue.interrupt()
                    await trio.lowlevel.checkpoint()
                    left = _TURN
            queue.interrupt()
