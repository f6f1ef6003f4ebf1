"""What a policy decided, for those who want to know."""

from __future__ import annotations

from typing import Final, Literal, final

import attrs
import trio

from .._public import public
from .._util import validators as check

#: Events that wait for a reader, unless it asks for more or fewer.
MAX_BUFFER: Final = 256


@public
@attrs.frozen(kw_only=True)
class EgressEvent:
    """One decision about what a guest wanted.

    The guest chose the names in it, within the letters, digits, hyphens and underscores of host
    names.
    """

    allowed: bool
    #: ``"tcp"``, ``"udp"``, or ``"dns"`` for a question to the resolver.
    protocol: Literal["tcp", "udp", "dns"]
    #: Where to; ``None`` for ``"dns"``.
    address: str | None
    port: int
    #: The name that the guest was told this address for, or that it asks about.
    host: str | None
    #: Why, for people.
    reason: str
    #: Events before this one that this reader lost, not counting those of earlier ``missed``.
    missed: int = 0


@final
class EventFeed:
    """Hands events to any number of readers, and never waits for one."""

    def __init__(self) -> None:
        self._readers: list[_Reader] = []
        self._closed = False

    def subscribe(self, max_buffer: int) -> trio.MemoryReceiveChannel[EgressEvent]:
        """A channel of the events from now on. Its end is that of the feed.

        :raises ConfigError: ``max_buffer`` is no integer above 0.
        """
        check.integer("max_buffer", max_buffer, 1)
        send, receive = trio.open_memory_channel[EgressEvent](max_buffer)
        if self._closed:
            send.close()
        else:
            self._readers.append(_Reader(send, receive.clone()))
        return receive

    def publish(self, event: EgressEvent) -> None:
        """Hand ``event`` on. Plain."""
        for reader in list(self._readers):
            if not reader.offer(event):
                self._readers.remove(reader)

    def close(self) -> None:
        """No more events come. Plain and idempotent."""
        self._closed = True
        while self._readers:
            self._readers.pop().close()


@final
@attrs.frozen
class _Reader:
    send: trio.MemorySendChannel[EgressEvent]
    # The other end once more, to take the oldest out.
    receive: trio.MemoryReceiveChannel[EgressEvent]

    def offer(self, event: EgressEvent) -> bool:
        """Queue an event, at the cost of the oldest. False: the reader has left."""
        if self.send.statistics().open_receive_channels < 2:
            self.close()
            return False
        missed = 0
        while True:
            try:
                self.send.send_nowait(attrs.evolve(event, missed=missed))
                return True
            except trio.WouldBlock:
                missed += 1 + self.receive.receive_nowait().missed

    def close(self) -> None:
        self.send.close()
        self.receive.close()
