"""The ACPI tables of the machine: hardware-reduced ACPI (6.5, §4.1), and PCI Express.

There is nothing of a PC's power management: no SCI, no PM timer, no events. A guest ends itself
by the sleep control register and the reset register; its devices are one UART and whatever it
finds on PCI, whose configuration space is mapped memory and whose interrupts are messages.
"""

from __future__ import annotations

import struct
from typing import Final

from ....devices.power import RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_S5
from ....errors import ConfigError
from . import aml, layout

_OEM: Final = b"SUPERM"
_OEM_TABLE: Final = b"TRIOSUPM"
_CREATOR: Final = b"TRIO"
_HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
_CHECKSUM: Final = 9  # its offset in the header
_RSDP: Final = struct.Struct("<8sB6sBIIQB3x")
_ALIGNMENT: Final = 16

# Fixed feature flags of the FADT (§5.2.9, table 5.10).
_WBINVD: Final = 1 << 0
_PROC_C1: Final = 1 << 2
_NO_POWER_BUTTON: Final = 1 << 4  # or none that is a fixed feature
_NO_SLEEP_BUTTON: Final = 1 << 5
_RESET_REGISTER: Final = 1 << 10
_HW_REDUCED: Final = 1 << 20
# IA-PC boot architecture flags (table 5.11); no bit for an i8042 either.
_NO_VGA: Final = 1 << 2
_NO_CMOS_RTC: Final = 1 << 5

_SYSTEM_IO: Final = 1
_BYTE_ACCESS: Final = 1


def build_tables(memory_mib: int, vcpus: int) -> bytes:
    """Build all tables, to lie at :data:`.layout.ACPI_TABLES`. The RSDP is the first of them.

    :raises ConfigError: more vCPUs than the machine has places for.
    """
    if not 1 <= vcpus <= layout.MAX_VCPUS:
        raise ConfigError(f"{vcpus} vCPUs; 1 to {layout.MAX_VCPUS} are possible")
    blob = bytearray(_align(_RSDP.size))
    addresses = []
    dsdt = _append(blob, _table(b"DSDT", 2, _dsdt(memory_mib, vcpus)))
    for table in (
        _table(b"FACP", 6, _fadt(dsdt)),
        _table(b"APIC", 5, _madt(vcpus)),
        _table(b"MCFG", 1, _mcfg()),
    ):
        addresses.append(_append(blob, table))
    entries = struct.pack(f"<{len(addresses)}Q", *addresses)
    blob[: _RSDP.size] = _rsdp(_append(blob, _table(b"XSDT", 1, entries)))
    return bytes(blob)


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _append(blob: bytearray, table: bytes) -> int:
    """Put a table at the end; give its guest-physical address."""
    address = layout.ACPI_TABLES + len(blob)
    blob += table.ljust(_align(len(table)), b"\0")
    return address


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    size = _HEADER.size + len(body)
    table = bytearray(
        _HEADER.pack(signature, size, revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1) + body
    )
    table[_CHECKSUM] = -sum(table) & 0xFF
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    rsdp = bytearray(_RSDP.pack(b"RSD PTR ", 0, _OEM, 2, 0, _RSDP.size, xsdt, 0))
    rsdp[8] = -sum(rsdp[:20]) & 0xFF
    rsdp[32] = -sum(rsdp) & 0xFF
    return bytes(rsdp)


def _port_register(offset: int) -> bytes:
    """Encode one of the power device's byte registers (generic address structure, §5.2.3.2)."""
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8, 0, _BYTE_ACCESS, layout.POWER_PORT + offset)


def _fadt(dsdt: int) -> bytes:
    """Encode the FADT (§5.2.9). Offsets are those of the table, header included."""
    table = bytearray(276)
    flags = _WBINVD | _PROC_C1 | _NO_POWER_BUTTON | _NO_SLEEP_BUTTON | _RESET_REGISTER | _HW_REDUCED
    struct.pack_into("<H", table, 109, _NO_VGA | _NO_CMOS_RTC)
    struct.pack_into("<I", table, 112, flags)
    table[116:128] = _port_register(RESET)
    table[128] = RESET_VALUE
    table[131] = 3  # minor revision: ACPI 6.3
    struct.pack_into("<Q", table, 140, dsdt)
    table[244:256] = _port_register(SLEEP_CONTROL)
    table[256:268] = _port_register(SLEEP_STATUS)
    table[268:276] = b"KVM".ljust(8, b"\0")  # hypervisor vendor
    return bytes(table[_HEADER.size :])


def _madt(vcpus: int) -> bytes:
    """Encode the MADT (§5.2.12): local APICs by id, one IOAPIC, and LINT1 as NMI of each.

    Nothing is overridden: the first interrupts are the pins of the IOAPIC, one by one.
    """
    entries = [struct.pack("<BBBBI", 0, 8, index, index, 1) for index in range(vcpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC, 0))
    entries.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))
    return struct.pack("<II", layout.LOCAL_APIC, 0) + b"".join(entries)


def _mcfg() -> bytes:
    """Encode the MCFG (PCI Firmware Specification 3.3, §4.1.2): segment 0, bus 0."""
    return bytes(8) + struct.pack("<QHBB4x", layout.PCI_ECAM, 0, 0, 0)


def _dsdt(memory_mib: int, vcpus: int) -> bytes:
    sleep = aml.package(*(aml.integer(value) for value in (SLEEP_TYPE_S5, 0, 0, 0)))
    return aml.name("\\_S5", sleep) + aml.scope(
        "\\_SB",
        *(_processor(index) for index in range(vcpus)),
        aml.device(
            "MBRD",  # the motherboard: reserves what bridges and drivers must not use
            aml.name("_HID", aml.eisa_id("PNP0C02")),
            aml.name("_UID", aml.integer(0)),
            aml.name(
                "_CRS",
                aml.resources(
                    aml.memory(layout.PCI_ECAM, layout.PCI_ECAM_SIZE),
                    aml.io_ports(layout.POWER_PORT, layout.POWER_PORTS),
                ),
            ),
        ),
        aml.device(
            "COM1",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(1)),
            aml.name(
                "_CRS",
                aml.resources(
                    aml.io_ports(layout.SERIAL_PORT, layout.SERIAL_PORTS),
                    aml.irq(layout.SERIAL_GSI),
                ),
            ),
        ),
        aml.device(
            "PCI0",
            aml.name("_HID", aml.eisa_id("PNP0A08")),
            aml.name("_CID", aml.eisa_id("PNP0A03")),
            aml.name("_SEG", aml.integer(0)),
            aml.name("_BBN", aml.integer(0)),
            aml.name("_UID", aml.integer(0)),
            aml.name(
                "_CRS",
                aml.resources(
                    aml.bus_numbers(0, 0),
                    aml.window_32(layout.PCI_WINDOW_32, layout.PCI_WINDOW_32_SIZE),
                    aml.window_64(*layout.pci_window_64(memory_mib)),
                ),
            ),
        ),
    )


def _processor(index: int) -> bytes:
    return aml.device(
        f"C{index:03X}",
        aml.name("_HID", aml.string("ACPI0007")),
        aml.name("_UID", aml.integer(index)),
    )
