"""A 16550A UART that only sends: the guest's console.

To a driver it is the chip (National Semiconductor PC16550D), with its divisor latch, FIFOs,
loopback, scratch register and the interrupt "transmitter empty". Bytes leave at once, so the
transmitter is always empty. Nothing is ever received.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, final

# Registers, by their offset.
_DATA: Final = 0  # THR and RBR; the divisor's low byte when the latch is open
_IER: Final = 1  # the divisor's high byte when the latch is open
_IIR_FCR: Final = 2
_LCR: Final = 3
_MCR: Final = 4
_LSR: Final = 5
_MSR: Final = 6
_SCRATCH: Final = 7

_IER_THRE: Final = 0x02
_IER_MASK: Final = 0x0F
_IIR_NONE: Final = 0x01
_IIR_THRE: Final = 0x02
_IIR_FIFOS: Final = 0xC0
_FCR_ENABLE: Final = 0x01
_LCR_LATCH: Final = 0x80
_MCR_MASK: Final = 0x1F
_MCR_LOOP: Final = 0x10
_LSR_IDLE: Final = 0x60  # THR and transmitter are empty
_MSR_CONNECTED: Final = 0xB0  # DCD, DSR, CTS

#: The chip's FIFO, in bytes, and so the longest piece that ``output`` gets.
FIFO_SIZE: Final = 16

_REGISTERS: Final = ("ier", "fifos", "lcr", "mcr", "scratch", "divisor_low", "divisor_high")


@final
class Serial:
    """Eight registers of a UART, for a :class:`.Bus`.

    With the FIFOs on, bytes go out together: when the FIFO is full, when a line ends, or when the
    guest looks at another register, as a driver does after each burst. With the FIFOs off they go
    out one by one.
    """

    def __init__(self, output: Callable[[bytes], None], interrupt: Callable[[], None]) -> None:
        """Make the UART. Both callbacks are called in the thread of whoever accesses a register.

        :param output: gets the bytes sent, at most :data:`FIFO_SIZE` at a time.
        :param interrupt: called when the interrupt line goes up; the line is edge-triggered.
        """
        self._output = output
        self._interrupt = interrupt
        self._fifo = bytearray()
        self._ier = 0
        self._fifos = 0
        self._lcr = 0
        self._mcr = 0
        self._scratch = 0
        self._divisor_low = 1
        self._divisor_high = 0
        # Whether "THR empty", the one cause of interrupts, is enabled and not acknowledged.
        self._pending = False

    def read(self, offset: int, size: int) -> int:
        if size > 1:
            return sum(self.read(offset + i, 1) << 8 * i for i in range(size))
        if self._fifo:
            self.flush()
        if offset == _LSR:
            return _LSR_IDLE
        if offset == _IIR_FCR:
            cause = _IIR_THRE if self._pending else _IIR_NONE
            self._pending = False
            return cause | self._fifos
        if offset == _DATA:
            return self._divisor_low if self._lcr & _LCR_LATCH else 0
        if offset == _IER:
            return self._divisor_high if self._lcr & _LCR_LATCH else self._ier
        if offset == _LCR:
            return self._lcr
        if offset == _MCR:
            return self._mcr
        if offset == _MSR:
            return self._modem_status()
        return self._scratch

    def write(self, offset: int, size: int, value: int) -> None:
        if size > 1:
            for i in range(size):
                self.write(offset + i, 1, value >> 8 * i & 0xFF)
            return
        if offset == _DATA and not self._lcr & _LCR_LATCH:
            self._send(value)
            return
        if self._fifo:
            self.flush()
        if offset == _DATA:
            self._divisor_low = value
        elif offset == _IER:
            self._write_ier(value)
        elif offset == _IIR_FCR:
            self._fifos = _IIR_FIFOS if value & _FCR_ENABLE else 0
        elif offset == _LCR:
            self._lcr = value
        elif offset == _MCR:
            self._mcr = value & _MCR_MASK
        elif offset == _SCRATCH:
            self._scratch = value

    def flush(self) -> None:
        """Send the bytes of the FIFO, also at the machine's end, when no driver does it."""
        if self._fifo:
            data = bytes(self._fifo)
            self._fifo.clear()
            self._output(data)

    def save(self) -> dict[str, int]:
        """Send the bytes of the FIFO, then give the state, as JSON has it."""
        self.flush()
        state = {name: int(getattr(self, f"_{name}")) for name in _REGISTERS}
        state["pending"] = int(self._pending)
        return state

    def load(self, state: Mapping[str, int]) -> None:
        """Take over the state that :meth:`save` gave. :raises ValueError: it is no such state."""
        if set(state) != {*_REGISTERS, "pending"} or not all(
            type(value) is int and 0 <= value <= 0xFF for value in state.values()
        ):
            raise ValueError("this is no state of a serial port")
        for name in _REGISTERS:
            setattr(self, f"_{name}", state[name])
        self._ier &= _IER_MASK
        self._mcr &= _MCR_MASK
        self._fifos &= _IIR_FIFOS
        self._pending = bool(state["pending"])

    def _send(self, value: int) -> None:
        if not self._mcr & _MCR_LOOP:
            self._fifo.append(value)
            if not self._fifos or value == 0x0A or len(self._fifo) >= FIFO_SIZE:
                self.flush()
        # The byte has left: THR is empty again.
        if self._ier & _IER_THRE:
            self._raise_pending()

    def _write_ier(self, value: int) -> None:
        if self._lcr & _LCR_LATCH:
            self._divisor_high = value
            return
        enabled = value & ~self._ier
        self._ier = value & _IER_MASK
        if not value & _IER_THRE:
            self._pending = False
        elif enabled & _IER_THRE:
            self._raise_pending()

    def _raise_pending(self) -> None:
        if not self._pending:
            self._pending = True
            self._interrupt()

    def _modem_status(self) -> int:
        if not self._mcr & _MCR_LOOP:
            return _MSR_CONNECTED
        # Loopback: DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD.
        mcr = self._mcr
        return (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 4) << 4 | (mcr & 8) << 4
