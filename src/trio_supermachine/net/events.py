"""Events of a guest's way out, and the feed that hands them to readers."""

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
    """One decision about a connection or a name that a guest wanted.

    The guest chose the names in it, within the letters, digits, hyphens and underscores of host
    names.

    :ivar allowed: the decision.
    :ivar protocol: ``"tcp"``, ``"udp"``, or ``"dns"`` for a question to the resolver.
    :ivar address: the address that the guest wanted; ``None`` for ``"dns"``.
    :ivar port: the port that it wanted; 53 for ``"dns"``.
    :ivar host: the name that the guest was told this address for, or that it asks about.
    :ivar reason: the reason for the decision, for people.
    :ivar missed: the number of events before this one that this reader has lost, not counting
        those of earlier ``missed``.

    Example::

        with trio.move_on_after(1):
            async for event in vm.egress_events():
                print(event.allowed, event.protocol, event.address, event.port, event.reason)
    """

    allowed: bool
    protocol: Literal["tcp", "udp", "dns"]
    address: str | None
    port: int
    host: str | None
    reason: str
    missed: int = 0


@final
class EventFeed:
    """A feed of events for any number of readers, which never waits for one."""

    def __init__(self) -> None:
        self._readers: list[_Reader] = []
        self._closed = False

    def subscribe(self, max_buffer: int) -> trio.MemoryReceiveChannel[EgressEvent]:
        """Give a channel of the events from now on; it ends with the feed.

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
        """Hand ``event`` to all readers. Plain."""
        for reader in list(self._readers):
            if not reader.offer(event):
                self._readers.remove(reader)

    def close(self) -> None:
        """End the feed and all channels. Plain and idempotent."""
        self._closed = True
        while self._readers:
            self._readers.pop().close()


@final
@attrs.frozen
class _Reader:
    send: trio.MemorySendChannel[EgressEvent]
    # A clone of the reader's end, which takes the oldest event out.
    receive: trio.MemoryReceiveChannel[EgressEvent]

    def offer(self, event: EgressEvent) -> bool:
        """Queue an event, at the cost of the oldest. Return whether the reader is still there."""
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
