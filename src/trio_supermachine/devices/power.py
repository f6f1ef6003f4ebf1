"""Registers by which a guest ends itself: ACPI's, and those of a PC's keyboard controller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, final

PowerEvent = Literal["shutdown", "reset"]

# The registers of AcpiPower and their values, as the tables (FADT, \_S5) name them.
SLEEP_CONTROL: Final = 0
SLEEP_STATUS: Final = 1
RESET: Final = 2
RESET_VALUE: Final = 1
#: The sleep type that stands for S5, "soft off".
SLEEP_TYPE_S5: Final = 5

_SLEEP_TYPE_SHIFT: Final = 2
_SLEEP_TYPE_MASK: Final = 7
_SLEEP_ENABLE: Final = 1 << 5

_KEYBOARD_COMMAND: Final = 4  # port 0x64
_PULSE_RESET: Final = 0xFE


@final
class AcpiPower:
    """Sleep control, sleep status and reset registers (ACPI 6.5 §4.8.3.6, .7), a byte each.

    Reads give zeros: nothing has woken the machine.
    """

    def __init__(self, notify: Callable[[PowerEvent], None]) -> None:
        """Make the registers.

        :param notify: called for each request, in the thread of whoever writes.
        """
        self._notify = notify

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        for i in range(size):
            self._write_byte(offset + i, value >> 8 * i & 0xFF)

    def _write_byte(self, offset: int, value: int) -> None:
        if offset == SLEEP_CONTROL:
            kind = value >> _SLEEP_TYPE_SHIFT & _SLEEP_TYPE_MASK
            if value & _SLEEP_ENABLE and kind == SLEEP_TYPE_S5:
                self._notify("shutdown")
        elif offset == RESET and value == RESET_VALUE:
            self._notify("reset")


@final
class KeyboardReset:
    """Keyboard controller (i8042) on ports 0x60 to 0x64, with its reset command alone.

    It has no keys, and is never busy, which a kernel waits for before a command.
    """

    def __init__(self, notify: Callable[[PowerEvent], None]) -> None:
        """Make the controller.

        :param notify: called for each request, in the thread of whoever writes.
        """
        self._notify = notify

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        index = _KEYBOARD_COMMAND - offset
        if index < size and value >> 8 * index & 0xFF == _PULSE_RESET:
            self._notify("reset")
