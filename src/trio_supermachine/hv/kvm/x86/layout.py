"""The layout of a guest's physical address space and of its I/O ports.

::

    0                        start information, memory map, command line (read once, early)
    0xa0000                  nothing a kernel would use: 384 KiB of a PC's video memory and BIOS
      0xe0000                the ACPI tables, which begin with the RSDP
    1 MiB                    RAM: the kernel at its own address, the initramfs at the end
    3 GiB                    PCI: memory windows of 32-bit BARs
    0xe0000000               PCI: configuration space (ECAM) of bus 0
    0xfec00000, 0xfee00000   IOAPIC, local APICs
    0xfffbc000               KVM's own pages on Intel processors
    4 GiB                    the rest of the RAM
    16 GiB or the next       PCI: memory windows of 64-bit BARs
    multiple of it

Addresses of things that QEMU's ``microvm`` machine has, too, are the same there.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# Below 640 KiB. The kernel copies these out before it gives the memory to anyone.
START_INFO: Final = 0x6000
MEMORY_MAP: Final = 0x7000
COMMAND_LINE: Final = 0x20000
#: Bytes that the kernel keeps of a command line, with the NUL that ends it.
COMMAND_LINE_SIZE: Final = 2048
#: Start of the data of a PC's BIOS: memory is usable below.
LOW_MEMORY_END: Final = 0x9FC00

ACPI_TABLES: Final = 0xE0000
ACPI_TABLES_SIZE: Final = 0x10000
HIGH_MEMORY: Final = 1 * MIB

#: RAM lies below this address and, what does not fit, from 4 GiB on.
LOW_RAM_END: Final = 3 * GIB
HIGH_RAM: Final = 4 * GIB

PCI_WINDOW_32: Final = LOW_RAM_END
PCI_WINDOW_32_SIZE: Final = 512 * MIB
PCI_ECAM: Final = 0xE0000000
#: Bus 0: 32 devices of 8 functions of 4 KiB.
PCI_ECAM_SIZE: Final = 1 * MIB
PCI_WINDOW_64_SIZE: Final = 16 * GIB

IOAPIC: Final = 0xFEC00000
LOCAL_APIC: Final = 0xFEE00000

#: KVM_SET_IDENTITY_MAP_ADDR: one page; and KVM_SET_TSS_ADDR: the three pages that follow.
KVM_IDENTITY_MAP: Final = 0xFFFBC000
KVM_TSS: Final = KVM_IDENTITY_MAP + 4 * KIB

# I/O ports.
SERIAL_PORT: Final = 0x3F8
SERIAL_PORTS: Final = 8
SERIAL_GSI: Final = 4
KEYBOARD_PORT: Final = 0x60
KEYBOARD_PORTS: Final = 5
POWER_PORT: Final = 0x600
POWER_PORTS: Final = 3

#: The first global system interrupt that is none of the IOAPIC's pins.
IOAPIC_PINS: Final = 24

MAX_VCPUS: Final = 16


def ram_ranges(memory_mib: int) -> tuple[tuple[int, int], ...]:
    """Give (start, size) in bytes of each range of RAM, ascending; the first starts at 0."""
    size = memory_mib * MIB
    low = min(size, LOW_RAM_END)
    return ((0, low),) if size == low else ((0, low), (HIGH_RAM, size - low))


def pci_window_64(memory_mib: int) -> tuple[int, int]:
    """Give (start, size) in bytes of the window for 64-bit BARs, above all RAM.

    Its end must be within the processor's physical addresses (:func:`.cpuid.address_bits`).
    """
    start, size = ram_ranges(memory_mib)[-1]
    end = max(start + size, HIGH_RAM)
    return -(-end // PCI_WINDOW_64_SIZE) * PCI_WINDOW_64_SIZE, PCI_WINDOW_64_SIZE
