"""The UART is a 16550A to drivers, and sends what is written to it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine.devices.serial import FIFO_SIZE, Serial

THR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR
THRI = 2


class Port:
    """A UART, what it sent, and how often its interrupt came."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.interrupts = 0
        self.serial = Serial(self.chunks.append, self._interrupt)

    def _interrupt(self) -> None:
        self.interrupts += 1

    @property
    def sent(self) -> bytes:
        return b"".join(self.chunks)

    def read(self, register: int) -> int:
        return self.serial.read(register, 1)

    def write(self, register: int, value: int) -> None:
        self.serial.write(register, 1, value)


def test_bytes_leave_at_once_without_fifos() -> None:
    port = Port()
    for byte in b"ab":
        port.write(THR, byte)
    assert port.chunks == [b"a", b"b"]


@pytest.mark.parametrize("register", [IER, IIR, LCR, MCR, LSR, MSR, SCR])
def test_with_fifos_a_burst_leaves_when_the_driver_looks_elsewhere(register: int) -> None:
    port = Port()
    port.write(FCR, 1)
    for byte in b"login:":
        port.write(THR, byte)
    assert port.chunks == []
    port.read(register)
    assert port.chunks == [b"login:"]


def test_with_fifos_a_line_or_a_full_fifo_leaves() -> None:
    port = Port()
    port.write(FCR, 1)
    for byte in b"one\n" + b"x" * FIFO_SIZE:
        port.write(THR, byte)
    assert port.chunks == [b"one\n", b"x" * FIFO_SIZE]


def test_flush_sends_what_is_left() -> None:
    port = Port()
    port.write(FCR, 1)
    port.write(THR, ord("?"))
    port.serial.flush()
    port.serial.flush()
    assert port.chunks == [b"?"]


def test_turning_the_fifos_off_sends_what_is_in_them() -> None:
    port = Port()
    port.write(FCR, 1)
    port.write(THR, 65)
    port.write(FCR, 0)
    port.write(THR, 66)
    assert port.sent == b"AB"


def test_a_driver_recognises_a_16550a() -> None:
    """What the autoconfiguration of Linux's 8250 driver tries, in its order."""
    port = Port()
    port.write(IER, 0)
    assert port.read(IER) == 0
    port.write(IER, 0x0F)
    assert port.read(IER) & 0x0F == 0x0F
    port.write(IER, 0)
    port.write(MCR, 0x10 | 0x08 | 0x02)  # loopback: OUT2 and RTS come back as DCD and CTS
    assert port.read(MSR) & 0xF0 == 0x90
    port.write(MCR, 0)
    port.write(LCR, 0xBF)
    port.write(FCR, 0)
    port.write(LCR, 0)
    port.write(FCR, 1)
    assert port.read(IIR) >> 6 == 3  # FIFOs that work
    port.write(LCR, 0x80)
    assert port.read(IIR) != 0  # no EFR: not a 16650
    port.write(LCR, 0)
    port.write(FCR, 0x21)
    assert port.read(IIR) >> 5 == 6  # no 64-byte FIFO, with and without the latch
    port.write(LCR, 0x80)
    port.write(FCR, 0x21)
    assert port.read(IIR) >> 5 == 6
    port.write(LCR, 0)
    port.write(IER, 0x40)
    assert port.read(IER) & 0x40 == 0  # no UUE: not an XScale
    assert port.sent == b""


def test_the_divisor_latch_hides_data_and_interrupts() -> None:
    port = Port()
    port.write(IER, THRI)
    port.write(LCR, 0x83)
    port.write(THR, 0x0C)
    port.write(IER, 0x01)
    assert (port.read(THR), port.read(IER)) == (0x0C, 0x01)
    port.write(LCR, 0x03)
    assert (port.read(THR), port.read(IER)) == (0, THRI)
    assert port.sent == b""


def test_loopback_sends_nothing() -> None:
    port = Port()
    port.write(MCR, 0x10)
    port.write(THR, 65)
    assert port.sent == b""


def test_the_transmitter_is_always_empty() -> None:
    port = Port()
    port.write(THR, 65)
    assert port.read(LSR) == 0x60


def test_enabling_the_interrupt_raises_it_each_time() -> None:
    """Linux tests for both: a UART that does not is treated as broken."""
    port = Port()
    port.write(IER, THRI)
    assert port.interrupts == 1
    assert port.read(IIR) == 0x02
    assert port.read(IIR) == 0x01
    port.write(IER, 0)
    port.write(IER, THRI)
    assert port.interrupts == 2
    assert port.read(IIR) == 0x02


def test_a_burst_is_one_interrupt() -> None:
    port = Port()
    port.write(FCR, 1)
    port.write(IER, THRI)
    for _ in range(3):
        assert port.read(IIR) & 0x0F == 0x02
        for byte in b"0123456789abcdef":
            port.write(THR, byte)
    assert port.interrupts == 1 + 3
    port.write(IER, 0)
    assert port.read(IIR) & 0x0F == 0x01


accesses = st.lists(
    st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 255)),
    max_size=60,
)


def play(port: Port, steps: list[tuple[bool, int, int]]) -> list[int]:
    found = []
    for is_read, register, value in steps:
        if is_read:
            found.append(port.read(register))
        else:
            port.write(register, value)
    return found


@settings(deadline=None)
@given(accesses)
def test_any_accesses_are_answered_with_bytes(steps: list[tuple[bool, int, int]]) -> None:
    port = Port()
    assert all(0 <= value <= 0xFF for value in play(port, steps))
    assert all(0 < len(chunk) <= FIFO_SIZE for chunk in port.chunks)
    writes = sum(1 for is_read, register, _ in steps if not is_read and register == THR)
    port.serial.flush()
    assert len(port.sent) <= writes


@settings(deadline=None)
@given(accesses, accesses)
def test_a_loaded_state_goes_on_as_the_saved_one(
    before: list[tuple[bool, int, int]], after: list[tuple[bool, int, int]]
) -> None:
    one, other = Port(), Port()
    play(one, before)
    other.serial.load(json.loads(json.dumps(one.serial.save())))
    one.chunks.clear()
    one.interrupts = 0
    assert play(one, after) == play(other, after)
    assert (one.chunks, one.interrupts) == (other.chunks, other.interrupts)


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(2, 8), st.integers(0, (1 << 64) - 1))
def test_wide_accesses_are_many_narrow_ones(offset: int, size: int, value: int) -> None:
    size = min(size, 8 - offset)
    wide, narrow = Port(), Port()
    wide.serial.write(offset, size, value & (1 << 8 * size) - 1)
    for i in range(size):
        narrow.write(offset + i, value >> 8 * i & 0xFF)
    assert wide.serial.read(offset, size) == sum(
        narrow.read(offset + i) << 8 * i for i in range(size)
    )
    assert wide.chunks == narrow.chunks


def test_a_state_of_something_else_is_refused() -> None:
    good = Port().serial.save()
    for bad in (
        {},
        good | {"ier": 256},
        good | {"lcr": -1},
        good | {"more": 1},
        good | {"mcr": ""},
    ):
        with pytest.raises(ValueError, match="serial"):
            Port().serial.load(bad)  # type: ignore[arg-type]
