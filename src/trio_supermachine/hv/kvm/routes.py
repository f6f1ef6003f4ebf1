"""Interrupt routes: the MSI messages that event descriptors send, behind numbered lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from ...devices.msix import MsixMessage
from .api import KvmVm, MsiRoute
from .x86.layout import IOAPIC_PINS


@final
class InterruptRoutes:
    """Interrupt lines of one machine beyond the pins of its IOAPIC.

    The kernel itself raises a line that has a message, when its descriptor is written to. All
    methods want the machine's lock held.
    """

    def __init__(self, vm: KvmVm) -> None:
        self._vm = vm
        self._next = IOAPIC_PINS
        self._messages: dict[int, MsixMessage] = {}
        self._attached: set[int] = set()
        self._together = False

    def allocate(self, count: int) -> int:
        """Set ``count`` lines aside; give the first."""
        first = self._next
        self._next += count
        return first

    def route(self, gsi: int, eventfd: int, message: MsixMessage) -> None:
        """Let ``eventfd`` send ``message`` from now on."""
        if self._messages.get(gsi) != message:
            self._messages[gsi] = message
            if not self._together:
                self._apply()
        if gsi not in self._attached:
            self._attached.add(gsi)
            self._vm.irqfd(eventfd, gsi)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Collect the changes of a block, and apply them at once at its end."""
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
