"""Which interrupt an event descriptor raises: MSI messages behind numbered lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from ...devices.msix import MsixMessage
from .api import KvmVm, MsiRoute
from .x86.layout import IOAPIC_PINS


@final
class InterruptRoutes:
    """The interrupt lines of one machine beyond the pins of its IOAPIC.

    A line that has a message is raised through its descriptor without a call of ours. All
    methods want the machine's lock held.
    """

    def __init__(self, vm: KvmVm) -> None:
        self._vm = vm
        self._next = IOAPIC_PINS
        self._messages: dict[int, MsixMessage] = {}
        self._attached: set[int] = set()
        self._together = False

    def allocate(self, count: int) -> int:
        """Set ``count`` lines aside; gives the first."""
        first = self._next
        self._next += count
        return first

    def route(self, gsi: int, eventfd: int, message: MsixMessage) -> None:
        """Have ``eventfd`` send ``message`` from now on."""
        if self._messages.get(gsi) != message:
            self._messages[gsi] = message
            if not self._together:
                self._apply()
        if gsi not in self._attached:
            self._attached.add(gsi)
            self._vm.irqfd(eventfd, gsi)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which routes change without an effect, and at once at its end."""
        self._together = True
        try:
            yield
        finally:
            self._together = False
        self._apply()

    def _apply(self) -> None:
        self._vm.set_gsi_routing(
            MsiRoute(gsi, message.address, message.data) for gsi, message in self._messages.items()
        )
