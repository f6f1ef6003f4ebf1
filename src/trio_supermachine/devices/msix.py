"""MSI-X: a function's table of interrupt messages and its pending bits (PCI 3.0 §6.8.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import attrs

#: Bytes of one table entry: address (64 bits), data (32), vector control (32).
ENTRY_SIZE: Final = 16
MAX_VECTORS: Final = 2048

CONTROL_ENABLE: Final = 0x8000
CONTROL_FUNCTION_MASK: Final = 0x4000
#: The bits of message control that can be written.
CONTROL_WRITABLE: Final = CONTROL_ENABLE | CONTROL_FUNCTION_MASK

# The bits of an entry that can be written: of the address all but the last two, of vector control
# only the mask bit.
_ENTRY_MASK: Final = (1 << 128) - 1 - 3 - (0xFFFF_FFFE << 96)
_ENTRY_MASKED: Final = 1 << 96


@attrs.frozen
class MsixMessage:
    """Write that an interrupt makes: ``data`` to ``address``."""

    address: int
    data: int


@final
class Msix:
    """Vectors of one function, all masked at first."""

    def __init__(self, vectors: int) -> None:
        if not 0 < vectors <= MAX_VECTORS:
            raise ValueError("MSI-X has 1 to 2048 vectors")
        self._entries = [_ENTRY_MASKED] * vectors
        self._control = 0
        self._pending = 0

    @property
    def vectors(self) -> int:
        """Number of vectors."""
        return len(self._entries)

    @property
    def enabled(self) -> bool:
        """Whether the driver uses MSI-X."""
        return bool(self._control & CONTROL_ENABLE)

    @property
    def control(self) -> int:
        """Message control: the 16 bits of the capability."""
        return self._control | (len(self._entries) - 1)

    def message(self, vector: int) -> MsixMessage | None:
        """Give the message of ``vector``; ``None`` while it is masked or MSI-X is not enabled."""
        entry = self._entries[vector]
        if self._control & CONTROL_WRITABLE != CONTROL_ENABLE or entry & _ENTRY_MASKED:
            return None
        return MsixMessage(entry & (1 << 64) - 1, entry >> 64 & 0xFFFF_FFFF)

    def trigger(self, vector: int) -> bool:
        """Tell whether to send the message of ``vector``. If it is masked, make it pending."""
        if not self.enabled:
            return False
        if self.message(vector) is not None:
            return True
        self._pending |= 1 << vector
        return False

    def take_pending(self, vector: int) -> bool:
        """Tell whether ``vector`` was pending, and make it not pending."""
        bit = 1 << vector
        pending = bool(self._pending & bit)
        self._pending &= ~bit
        return pending

    def clear_pending(self) -> None:
        """Forget what is pending."""
        self._pending = 0

    def set_control(self, value: int) -> list[int]:
        """Write message control; give the vectors whose message changed."""
        before = [self.message(vector) for vector in range(self.vectors)]
        self._control = value & CONTROL_WRITABLE
        if not self.enabled:
            self._pending = 0
        return [v for v, message in enumerate(before) if message != self.message(v)]

    def read_table(self, offset: int, size: int) -> int:
        """Read ``size`` bytes at ``offset`` of the table; zeros beyond its end."""
        value = 0
        for at, vector, shift in _pieces(offset, size, self.vectors):
            value |= (self._entries[vector] >> shift & 0xFF) << at
        return value

    def write_table(self, offset: int, size: int, value: int) -> list[int]:
        """Write to the table; give the vectors whose message changed."""
        first, last = offset // ENTRY_SIZE, (offset + size - 1) // ENTRY_SIZE
        vectors = range(first, min(last + 1, self.vectors))
        before = [self.message(vector) for vector in vectors]
        for at, vector, shift in _pieces(offset, size, self.vectors):
            mask = _ENTRY_MASK & 0xFF << shift
            bits = (value >> at & 0xFF) << shift
            self._entries[vector] = self._entries[vector] & ~mask | bits & mask
        return [
            vector
            for vector, message in zip(vectors, before, strict=True)
            if message != self.message(vector)
        ]

    def read_pending(self, offset: int, size: int) -> int:
        """Read ``size`` bytes at ``offset`` of the pending bit array; zeros beyond its end."""
        return self._pending >> 8 * offset & (1 << 8 * size) - 1

    def save(self) -> dict[str, Any]:
        """Give the state, as JSON has it."""
        return {
            "control": self._control,
            "pending": f"{self._pending:x}",
            "entries": [f"{entry:032x}" for entry in self._entries],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over the state that :meth:`save` gave.

        :raises ValueError, KeyError, TypeError: it is no such state, or of other vectors.
        """
        entries = [int(entry, 16) for entry in state["entries"]]
        pending = int(state["pending"], 16)
        control = state["control"]
        if (
            len(entries) != self.vectors
            or any(entry & ~(_ENTRY_MASK) for entry in entries)
            or pending >> self.vectors
            or control & ~CONTROL_WRITABLE
        ):
            raise ValueError("not the MSI-X state of this function")
        self._entries, self._pending, self._control = entries, pending, control


def _pieces(offset: int, size: int, vectors: int) -> list[tuple[int, int, int]]:
    """Divide an access into bytes: (bit in the value, vector, bit in its entry) of each."""
    end = min(offset + size, ENTRY_SIZE * vectors)
    return [
        (8 * (byte - offset), byte // ENTRY_SIZE, 8 * (byte % ENTRY_SIZE))
        for byte in range(offset, end)
    ]
