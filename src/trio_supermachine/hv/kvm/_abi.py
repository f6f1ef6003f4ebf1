"""The little of the kernel's KVM interface that the probe needs, from ``linux/kvm.h``, x86-64."""

from __future__ import annotations

import struct
from typing import Final

API_VERSION: Final = 12

GET_API_VERSION: Final = 0xAE00
CREATE_VM: Final = 0xAE01
GET_VCPU_MMAP_SIZE: Final = 0xAE04
CREATE_VCPU: Final = 0xAE41
SET_USER_MEMORY_REGION: Final = 0x4020AE46
RUN: Final = 0xAE80
SET_REGS: Final = 0x4090AE82
GET_SREGS: Final = 0x8138AE83
SET_SREGS: Final = 0x4138AE84

EXIT_IO: Final = 2
EXIT_REASON: Final = struct.Struct("<8xI")  # struct kvm_run, its first fields

#: slot, flags, guest address, size, address in this process
MEMORY_REGION: Final = struct.Struct("<IIQQQ")

_REGS: Final = struct.Struct("<18Q")
_SEGMENT: Final = struct.Struct("<QIH10B")
_CONTROL_AT: Final = 8 * _SEGMENT.size + 2 * 16  # after eight segments and two tables
_CONTROL: Final = struct.Struct("<6Q")
SREGS_SIZE: Final = 312

_PE_NE_PG: Final = 0x8000_0021
_PAE: Final = 0x20
_LME_LMA: Final = 0x500


def regs(*, rip: int, rsp: int) -> bytes:
    """A ``struct kvm_regs`` that starts at ``rip`` with interrupts off."""
    return _REGS.pack(*(0,) * 6, rsp, *(0,) * 9, rip, 2)


def enter_long_mode(sregs: bytearray, page_table: int) -> None:
    """Make a ``struct kvm_sregs`` one of 64-bit supervisor mode."""
    # base, limit, selector; type, present, dpl, db, s, l, g, avl, unusable, padding
    code = _SEGMENT.pack(0, 0xFFFF_FFFF, 0x08, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
    data = _SEGMENT.pack(0, 0xFFFF_FFFF, 0x10, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    sregs[: 6 * _SEGMENT.size] = code + 5 * data
    _CONTROL.pack_into(sregs, _CONTROL_AT, _PE_NE_PG, 0, page_table, _PAE, 0, _LME_LMA)
