"""A PCI bus behind an ECAM window: configuration space, capabilities and memory BARs.

One bus, 32 devices of up to 8 functions, each with at most one 64-bit memory BAR. Calls come from
vCPU threads; the caller holds the machine's lock.

A hostile guest chooses every offset, and every size from 1 to 8 bytes. It may move a BAR, but only
within the bus's window and not over another: elsewhere the BAR answers nowhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Final, final

CONFIG_SIZE: Final = 256
#: Bytes of the window for each function.
ECAM_FUNCTION_SIZE: Final = 4096
#: Bytes of the window for the one bus.
ECAM_SIZE: Final = 256 * ECAM_FUNCTION_SIZE

# Registers of a type 0 header (PCI 3.0 §6.1).
REG_VENDOR_ID: Final = 0x00
REG_DEVICE_ID: Final = 0x02
REG_COMMAND: Final = 0x04
REG_STATUS: Final = 0x06
REG_REVISION: Final = 0x08
REG_CLASS: Final = 0x09
REG_HEADER_TYPE: Final = 0x0E
REG_BAR0: Final = 0x10
REG_SUBSYSTEM_VENDOR_ID: Final = 0x2C
REG_SUBSYSTEM_ID: Final = 0x2E
REG_CAPABILITIES: Final = 0x34
REG_INTERRUPT_LINE: Final = 0x3C

COMMAND_MEMORY: Final = 0x0002
COMMAND_MASTER: Final = 0x0004
COMMAND_INTX_DISABLE: Final = 0x0400
STATUS_CAPABILITIES: Final = 0x0010
HEADER_MULTIFUNCTION: Final = 0x80
BAR_MEMORY_64: Final = 0x04

CAP_VENDOR: Final = 0x09
CAP_MSIX: Final = 0x11

_FIRST_CAPABILITY: Final = 0x40
_LAST_REGISTER: Final = CONFIG_SIZE - 1


class PciFunction:
    """A function: its configuration space, and the mask of the bits that can be written.

    :param class_code: 24 bits: class, subclass, interface.
    :param bar_size: bytes of its memory BAR, a power of 2 and at least 4096; 0 for none.
    """

    def __init__(
        self,
        *,
        vendor_id: int,
        device_id: int,
        class_code: int,
        revision: int = 0,
        subsystem_vendor_id: int = 0,
        subsystem_id: int = 0,
        bar_size: int = 0,
    ) -> None:
        self.bar_size = bar_size
        self._config = bytearray(CONFIG_SIZE)
        self._mask = bytearray(CONFIG_SIZE)
        self._next_capability = _FIRST_CAPABILITY
        self._link = REG_CAPABILITIES
        self._set(REG_VENDOR_ID, 2, vendor_id)
        self._set(REG_DEVICE_ID, 2, device_id)
        self._set(REG_COMMAND, 2, 0, COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE)
        self._set(REG_REVISION, 1, revision)
        self._set(REG_CLASS, 3, class_code)
        self._set(REG_SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor_id)
        self._set(REG_SUBSYSTEM_ID, 2, subsystem_id)
        self._set(REG_INTERRUPT_LINE, 1, 0, 0xFF)
        if bar_size:
            # The lowest bits cannot be written: by that a driver finds the size.
            self._set(REG_BAR0, 8, BAR_MEMORY_64, (1 << 64) - bar_size)

    def _set(self, register: int, size: int, value: int, mask: int = 0) -> None:
        self._config[register : register + size] = value.to_bytes(size, "little")
        self._mask[register : register + size] = mask.to_bytes(size, "little")

    def _get(self, register: int, size: int) -> int:
        return int.from_bytes(self._config[register : register + size], "little")

    def _add_capability(self, kind: int, body: bytes, mask: bytes = b"") -> int:
        """Append a capability; give its register. ``body`` follows its kind and link."""
        at = self._next_capability
        self._next_capability = (at + 2 + len(body) + 3) & ~3
        if self._next_capability > CONFIG_SIZE:
            raise ValueError("the capabilities do not fit in the configuration space")
        self._config[self._link] = at
        self._link = at + 1
        self._config[at] = kind
        self._config[at + 2 : at + 2 + len(body)] = body
        self._mask[at + 2 : at + 2 + len(mask)] = mask
        self._config[REG_STATUS] |= STATUS_CAPABILITIES
        return at

    @property
    def bar(self) -> int | None:
        """Address that the driver wants for the BAR; ``None`` while memory decoding is off."""
        if not self.bar_size or not self._config[REG_COMMAND] & COMMAND_MEMORY:
            return None
        return self._get(REG_BAR0, 8) & -self.bar_size

    def place_bar(self, address: int) -> None:
        """Give the BAR its address, as a firmware does."""
        self._set(REG_BAR0, 8, address | BAR_MEMORY_64, (1 << 64) - self.bar_size)

    def set_multifunction(self) -> None:
        """Say that the device has functions beside this one."""
        self._config[REG_HEADER_TYPE] |= HEADER_MULTIFUNCTION

    def read_config(self, register: int, size: int) -> int:
        """Read ``size`` bytes at ``register``; ones beyond the configuration space."""
        found = bytes(self._config[register : register + size])
        return int.from_bytes(found.ljust(size, b"\xff"), "little")

    def write_config(self, register: int, size: int, value: int) -> bool:
        """Write to the bits that can be written; tell whether the BAR may have moved."""
        for at in range(register, min(register + size, CONFIG_SIZE)):
            mask = self._mask[at]
            self._config[at] = self._config[at] & ~mask | value & mask
            value >>= 8
        return register < REG_BAR0 + 8 and register + size > REG_COMMAND

    def read_bar(self, offset: int, size: int) -> int:
        """Read ``size`` bytes at ``offset`` of the BAR."""
        return 0

    def write_bar(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` bytes at ``offset`` of the BAR."""

    def bar_moved(self, address: int | None) -> None:
        """Let the BAR answer at ``address``, or with ``None`` nowhere. Called by the bus."""

    def loaded(self) -> None:
        """Go on: all functions have their state and BARs their places. Called by the bus."""

    def save(self) -> dict[str, Any]:
        """Give the state, as JSON has it."""
        return {"config": self._config.hex()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over the state that :meth:`save` gave; the bus places the BAR afterwards.

        :raises ValueError, KeyError, TypeError: it is no such state, or of another function.
        """
        config = bytearray.fromhex(state["config"])
        if len(config) != CONFIG_SIZE or any(
            (new ^ old) & ~mask & 0xFF
            for new, old, mask in zip(config, self._config, self._mask, strict=True)
        ):
            raise ValueError("the state of another PCI function")
        self._config = config


@final
class PciBus:
    """Bus 0: a host bridge at 00:00.0 and the functions that are added.

    :param window: guest-physical start of the window for BARs.
    :param window_size: its bytes.
    """

    def __init__(self, window: int, window_size: int) -> None:
        self._window = window
        self._window_end = window + window_size
        self._next_bar = window
        self._functions: dict[int, PciFunction] = {}
        # The addresses at which BARs answer: ascending, and by function.
        self._starts: list[int] = []
        self._decoded: list[tuple[int, PciFunction]] = []
        self._placed: dict[PciFunction, int] = {}
        bridge = PciFunction(vendor_id=0x1B36, device_id=0x0008, class_code=0x060000)
        self.add(bridge, device=0)

    def add(self, function: PciFunction, *, device: int, number: int = 0) -> None:
        """Plug ``function`` in as ``device`` (0 to 31), function ``number`` (0 to 7).

        Its BAR gets the next free address of the window. Call it before the guest runs, and in the
        same order for a restored machine as for the captured one.

        :raises ValueError: the slot is taken or does not exist, or the window is full.
        """
        slot = 8 * device + number
        if not (0 <= device < 32 and 0 <= number < 8) or slot in self._functions:
            raise ValueError(f"no free PCI slot {device}.{number}")
        if size := function.bar_size:
            address = (self._next_bar + size - 1) & -size
            if address + size > self._window_end:
                raise ValueError("no room for the BAR in the PCI window")
            function.place_bar(address)
            self._next_bar = address + size
        self._functions[slot] = function
        if number and (first := self._functions.get(8 * device)):
            first.set_multifunction()
        elif any(8 * device + other in self._functions for other in range(1, 8)):
            function.set_multifunction()

    def read(self, offset: int, size: int) -> int:
        """Read ``size`` bytes at ``offset`` of the ECAM window; ones where nothing is."""
        function = self._functions.get(offset // ECAM_FUNCTION_SIZE)
        if function is None:
            return (1 << 8 * size) - 1
        return function.read_config(offset % ECAM_FUNCTION_SIZE, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` bytes at ``offset`` of the ECAM window."""
        function = self._functions.get(offset // ECAM_FUNCTION_SIZE)
        if function is not None and function.write_config(offset % ECAM_FUNCTION_SIZE, size, value):
            self._decode()

    def find(self, address: int) -> tuple[PciFunction, int] | None:
        """Find the function whose BAR answers at ``address``, and the offset in the BAR."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0:
            start, function = self._decoded[at]
            if address - start < function.bar_size:
                return function, address - start
        return None

    def _decode(self) -> None:
        """Find out where BARs answer, and tell the functions for which that has changed."""
        placed: dict[PciFunction, int] = {}
        for function in self._functions.values():
            start = function.bar
            if start is None or start < self._window:
                continue
            end = start + function.bar_size
            if end <= self._window_end and all(
                end <= other or start >= other + neighbour.bar_size
                for neighbour, other in placed.items()
            ):
                placed[function] = start
        before, self._placed = self._placed, placed
        self._decoded = sorted(((at, function) for function, at in placed.items()), key=_start)
        self._starts = [start for start, _ in self._decoded]
        # BARs that leave a place go first: two never have one address.
        moved = [f for f in self._functions.values() if before.get(f) != placed.get(f)]
        for function in moved:
            if function in before:
                function.bar_moved(None)
        for function in moved:
            if function in placed:
                function.bar_moved(placed[function])

    def save(self) -> dict[str, Any]:
        """Give the state of all functions, as JSON has it. Their devices stand still."""
        return {f"{slot:02x}": function.save() for slot, function in self._functions.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over the state that :meth:`save` gave, before the guest runs.

        The same functions have been added. BARs, vectors and devices come up by the same calls as
        when a driver sets them up.

        :raises ValueError: it is no such state, or of other functions.
        """
        try:
            if sorted(state) != sorted(f"{slot:02x}" for slot in self._functions):
                raise ValueError("the state of other PCI functions")
            for slot, function in self._functions.items():
                function.load(state[f"{slot:02x}"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("not the state of a PCI bus") from error
        self._decode()
        for function in self._functions.values():
            function.loaded()


def _start(item: tuple[int, PciFunction]) -> int:
    return item[0]
