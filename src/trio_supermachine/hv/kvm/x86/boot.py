"""The boot of Linux by PVH: it puts a kernel and its start information into a new guest's memory.

The protocol is Xen's for hardware virtual machines (``xen/interface/hvm/start_info.h``,
docs/misc/pvh of Xen). The kernel starts in 32-bit protected mode without paging, at the address
that its ELF note names, and finds a structure whose address is in EBX.
"""

from __future__ import annotations

import io
import struct
from typing import Final

import attrs

from ....devices.memory import GuestMemory, GuestMemoryError
from ....errors import ConfigError
from ....kernels.image import MAX_IMAGE, least_memory_mib, read_kernel
from . import acpi, elf, layout
from .elf import Source

_START_INFO: Final = struct.Struct("<IIIIQQQQII")
_MODULE: Final = struct.Struct("<QQQQ")
_MEMORY_MAP_ENTRY: Final = struct.Struct("<QQII")
_MAGIC: Final = 0x336EC578
_VERSION: Final = 1

# Types of ranges in the memory map, which are those of e820.
_RAM: Final = 1
_RESERVED: Final = 2
_ACPI: Final = 3

_PAGE: Final = 4096

_CR0_PE: Final = 1 << 0
_CR0_ET: Final = 1 << 4
_CODE: Final = 0xB  # execute, read, accessed
_DATA: Final = 0x3  # read, write, accessed
_TSS: Final = 0xB  # 32 bits, busy


@attrs.frozen(kw_only=True)
class SegmentRegister:
    """A segment register with its hidden part, by the names of ``struct kvm_segment``."""

    base: int = 0
    limit: int = 0xFFFFFFFF
    selector: int
    type: int
    present: int = 1
    dpl: int = 0
    db: int = 1
    s: int = 1
    l: int = 0  # noqa: E741
    g: int = 1
    avl: int = 0


@attrs.frozen(kw_only=True)
class BootRegisters:
    """Registers of the first vCPU, by the names of ``struct kvm_regs`` and ``struct kvm_sregs``.

    All others are zero, or as after a reset.
    """

    rip: int
    rbx: int
    rflags: int = 2
    cr0: int = _CR0_PE | _CR0_ET
    cr4: int = 0
    efer: int = 0
    cs: SegmentRegister = SegmentRegister(selector=0x08, type=_CODE)
    data: SegmentRegister = SegmentRegister(selector=0x10, type=_DATA)  #: ds, es, fs, gs, ss
    tr: SegmentRegister = SegmentRegister(selector=0x18, type=_TSS, limit=0x67, s=0, db=0, g=0)


#: MSRs of every vCPU that a firmware would have set, by index: memory is cached write-back
#: (IA32_MTRR_DEF_TYPE) and string instructions are fast (IA32_MISC_ENABLE).
BOOT_MSRS: Final = {0x2FF: 0x806, 0x1A0: 0x1}


def load_linux(
    memory: GuestMemory,
    kernel: Source,
    initramfs: Source | None,
    *,
    cmdline: str,
    vcpus: int,
    origin: str = "kernel",
) -> BootRegisters:
    """Fill a new guest's memory, which must be all zeros, in the ranges of
    :func:`.layout.ram_ranges`.

    Raw files are read straight into guest memory; a bzImage is unpacked first. The call blocks:
    make it in a thread.

    :param kernel: a vmlinux (ELF) or a bzImage, with a PVH entry.
    :param cmdline: the whole kernel command line.
    :param origin: the kernel's name, for messages.
    :raises AssetNotFound: the kernel cannot be used.
    :raises ConfigError: the memory is too small for kernel and initramfs, the command line is too
        long, or there are too many vCPUs.
    :raises OSError: a file cannot be read.
    """
    memory_mib = memory.size // layout.MIB
    command_line = _command_line(cmdline)
    tables = acpi.build_tables(memory_mib, vcpus)
    kernel = _unpacked(kernel, origin)
    parsed = elf.read_pvh_kernel(kernel, origin)
    try:
        _load_kernel(memory, kernel, parsed, origin)
        module = _load_initramfs(memory, initramfs, parsed.end)
        memory.write(layout.ACPI_TABLES, tables)
        memory.write(layout.COMMAND_LINE, command_line)
        _write_start_info(memory, memory_map(memory_mib), module)
    except GuestMemoryError:
        size = 0 if initramfs is None else initramfs.seek(0, io.SEEK_END)
        raise ConfigError(
            f"{memory_mib} MiB of memory are too little for this kernel and initramfs; give it at"
            f" least {least_memory_mib(parsed.end, size + _PAGE)}"
        ) from None
    return BootRegisters(rip=parsed.entry, rbx=layout.START_INFO)


def memory_map(memory_mib: int) -> tuple[tuple[int, int, int], ...]:
    """Give the memory map for the kernel: (start, size, e820 type) of each range, ascending."""
    low, *high = layout.ram_ranges(memory_mib)
    return (
        (0, layout.LOW_MEMORY_END, _RAM),
        (layout.ACPI_TABLES, layout.ACPI_TABLES_SIZE, _ACPI),
        (layout.HIGH_MEMORY, low[1] - layout.HIGH_MEMORY, _RAM),
        (layout.PCI_ECAM, layout.PCI_ECAM_SIZE, _RESERVED),
        (layout.KVM_IDENTITY_MAP, 4 * _PAGE, _RESERVED),
        *((start, size, _RAM) for start, size in high),
    )


def _command_line(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape") + b"\0"
    if data.index(0) != len(data) - 1:
        raise ConfigError("the kernel command line has a NUL in it")
    if len(data) > layout.COMMAND_LINE_SIZE:
        most = layout.COMMAND_LINE_SIZE - 1
        raise ConfigError(f"the kernel command line has {len(data) - 1} bytes; {most} are possible")
    return data


def _unpacked(file: Source, origin: str) -> Source:
    """Give the file itself if it is ELF, else the ELF image in a bzImage."""
    file.seek(0)
    if file.read(len(elf.MAGIC)) == elf.MAGIC:
        return file
    file.seek(0)
    image = read_kernel(file.read(MAX_IMAGE) or b"", origin)
    if image.form != "elf":
        raise elf.unusable(origin, "no ELF kernel with a PVH entry can be unpacked from it")
    return io.BytesIO(image.data)


def _load_kernel(memory: GuestMemory, file: Source, kernel: elf.PvhKernel, origin: str) -> None:
    if kernel.segments[0].address < layout.HIGH_MEMORY:
        raise elf.unusable(origin, "it wants to lie below 1 MiB")
    for segment in kernel.segments:
        # All of it must be there, but zeros need not be written.
        with memory.view(segment.address, segment.size_in_memory) as whole:
            content = whole[: segment.size]
        with content:
            elf.read_into(file, segment.offset, content, origin)


def _load_initramfs(memory: GuestMemory, file: Source | None, above: int) -> tuple[int, int] | None:
    """Put the initramfs at the end of low memory, on whole pages; give its address and size."""
    if file is None:
        return None
    size = file.seek(0, io.SEEK_END)
    _, end = layout.ram_ranges(memory.size // layout.MIB)[0]
    start = (end - size) // _PAGE * _PAGE
    if start < above:
        raise GuestMemoryError("the initramfs would lie over the kernel")
    with memory.view(start, size) as view:
        elf.read_into(file, 0, view, "initramfs")
    return start, size


def _write_start_info(
    memory: GuestMemory,
    ranges: tuple[tuple[int, int, int], ...],
    module: tuple[int, int] | None,
) -> None:
    modules = layout.START_INFO + _START_INFO.size
    start_info = _START_INFO.pack(
        _MAGIC,
        _VERSION,
        0,
        0 if module is None else 1,
        0 if module is None else modules,
        layout.COMMAND_LINE,
        layout.ACPI_TABLES,
        layout.MEMORY_MAP,
        len(ranges),
        0,
    )
    memory.write(layout.START_INFO, start_info)
    if module is not None:
        memory.write(modules, _MODULE.pack(*module, 0, 0))
    memory.write(
        layout.MEMORY_MAP,
        b"".join(_MEMORY_MAP_ENTRY.pack(*entry, 0) for entry in ranges),
    )
