"""The firmware, and the room in a new guest's memory.

Theory of operation. Three parties put things into that memory, and none asks another:

1. QEMU loads the kernel to the addresses that the kernel itself names, and chooses a place for the
   initramfs: as high as it goes, on a page boundary, with its last byte in the last page of low
   memory (the memory below 4 GiB, at most 3 GiB of it).
2. The firmware puts down its tables, ACPI's among them.
3. The firmware then reads the initramfs to the place that QEMU chose.

A firmware that keeps tables at the end of low memory (SeaBIOS does) loses those that share the
last page with the initramfs, or all of them: how many depends on the initramfs's size modulo 4096.
Its kernel then finds garbage, and says nothing. Padding cannot help, for the padding would lie
there instead.

So a machine always runs qboot, a part of QEMU: what it has lies below 1 MiB, between 0xd0000 and
0xfffff. QEMU's own choice for this machine type is ``bios-microvm.bin``, which is qboot in Debian
12 and SeaBIOS in Debian 13. A kernel lies above 1 MiB. The initramfs could still lie over the
kernel, in a small memory; :func:`check_room` refuses that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ...errors import ConfigError
from ...kernels.image import KernelExtent, kernel_extent, least_memory_mib

#: Name of the firmware; QEMU looks for it among its own files.
FIRMWARE: Final = "qboot.rom"

_MIB: Final = 1 << 20
_PAGE: Final = 4096
#: RAM lies below this address and, what does not fit, from 4 GiB on.
_LOW_RAM_END: Final = 3 << 30


def initramfs_start(extent: KernelExtent, size: int, memory_mib: int) -> int:
    """Compute where QEMU puts an initramfs of ``size`` bytes; negative if it does not fit."""
    last = min(memory_mib * _MIB, _LOW_RAM_END) - 1
    if extent.initramfs_max is not None:
        last = min(last, extent.initramfs_max)
    return (last - size) // _PAGE * _PAGE


def check_room(kernel: Path, initramfs: Path, memory_mib: int) -> None:
    """Refuse a memory in which the initramfs would lie over the kernel.

    A file that is missing, or no kernel, passes: QEMU says what is wrong with it.

    :raises ConfigError: the memory is too small.
    """
    try:
        extent = kernel_extent(kernel)
        size = initramfs.stat().st_size
    except OSError:
        return
    if extent is None or initramfs_start(extent, size, memory_mib) >= extent.end:
        return
    least = -(-(extent.end + size + _PAGE) // _MIB)
    raise ConfigError(
        f"{memory_mib} MiB of memory are too little for this kernel and initramfs, which alone"
        f" take {least}; give it at least {least_memory_mib(extent.end, size + _PAGE)}, or build"
        " the small kernel (trio-supermachine kernel build)"
    )
