"""A kernel is put into memory as the PVH protocol has it; a bad file is a typed error."""

from __future__ import annotations

import io
import re
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine import AssetNotFound, ConfigError
from trio_supermachine.devices.memory import GuestMemory
from trio_supermachine.hv.kvm.x86 import layout
from trio_supermachine.hv.kvm.x86.boot import load_linux, memory_map
from trio_supermachine.hv.kvm.x86.elf import read_pvh_kernel

LOAD, NOTE = 1, 4
ENTRY = 0x100010
TEXT = b"kernel text " * 10


def program_header(kind: int, offset: int, address: int, size: int, in_memory: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, 0, offset, 0, address, size, in_memory, 4)


def pvh_note(entry: int = ENTRY, name: bytes = b"Xen\0", kind: int = 18) -> bytes:
    return struct.pack("<III", len(name), 8, kind) + name + struct.pack("<Q", entry)


def elf_kernel(
    *,
    segments: tuple[tuple[int, bytes, int], ...] = ((0x100000, TEXT, 0x2000),),
    notes: bytes = pvh_note(),
    machine: int = 62,
) -> bytes:
    """(address, bytes, size in memory) of each segment."""
    count = len(segments) + 1
    content_at = 64 + 56 * count
    headers, content = b"", notes
    for address, data, in_memory in segments:
        headers += program_header(LOAD, content_at + len(content), address, len(data), in_memory)
        content += data
    headers += program_header(NOTE, content_at, 0, len(notes), len(notes))
    header = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 2, machine, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0),
    )
    return header + headers + content


def guest_memory(memory_mib: int = 2) -> GuestMemory:
    return GuestMemory(
        [(start, memoryview(bytearray(size))) for start, size in layout.ram_ranges(memory_mib)]
    )


def boot(
    memory: GuestMemory,
    kernel: bytes,
    initramfs: bytes | None = None,
    *,
    cmdline: str = "quiet",
    vcpus: int = 1,
) -> tuple[int, ...]:
    """Load it; gives the start information that EBX points to."""
    registers = load_linux(
        memory,
        io.BytesIO(kernel),
        None if initramfs is None else io.BytesIO(initramfs),
        cmdline=cmdline,
        vcpus=vcpus,
        origin="test",
    )
    assert registers.rip == ENTRY
    return struct.unpack("<IIIIQQQQII", memory.read(registers.rbx, 56))


def test_the_kernel_finds_all_that_it_needs() -> None:
    memory = guest_memory()
    initramfs = b"070701" * 1000
    magic, version, _, modules, module, cmdline, rsdp, ranges, count, _ = boot(
        memory, elf_kernel(), initramfs, cmdline="console=ttyS0 quiet"
    )
    assert (magic, version, modules) == (0x336EC578, 1, 1)
    assert memory.read(0x100000, len(TEXT)) == TEXT
    assert memory.read(0x100000 + len(TEXT), 0x2000 - len(TEXT)).strip(b"\0") == b""
    address, size = struct.unpack("<QQ", memory.read(module, 16))
    assert memory.read(address, size) == initramfs
    assert address % 4096 == 0
    assert memory.read(cmdline, 20) == b"console=ttyS0 quiet\0"
    assert memory.read(rsdp, 8) == b"RSD PTR "
    entries = struct.iter_unpack("<QQII", memory.read(ranges, 24 * count))
    assert tuple(entry[:3] for entry in entries) == memory_map(2)


def test_every_size_modulo_a_page_has_a_place_of_its_own() -> None:
    memory = guest_memory()
    tables = layout.ACPI_TABLES, layout.ACPI_TABLES_SIZE
    boot(memory, elf_kernel(), b"")
    before = memory.read(*tables)
    for residue in range(4096):
        initramfs = b"i" * (8192 + residue)
        module = boot(memory, elf_kernel(), initramfs)[4]
        address, size = struct.unpack("<QQ", memory.read(module, 16))
        assert address % 4096 == 0
        assert address >= 0x102000  # where the kernel ends
        assert address + size <= 2 << 20
        assert memory.read(address, size) == initramfs
    assert memory.read(*tables) == before


def test_a_kernel_may_do_without_an_initramfs() -> None:
    assert boot(guest_memory(), elf_kernel())[3:5] == (0, 0)


def test_several_segments_go_where_they_belong() -> None:
    memory = guest_memory()
    boot(memory, elf_kernel(segments=((0x110000, b"data", 4), (0x100000, TEXT, len(TEXT)))))
    assert memory.read(0x110000, 4) == b"data"
    assert memory.read(0x100000, len(TEXT)) == TEXT


@settings(deadline=None)
@given(st.integers(2, 1 << 20))
def test_the_memory_map_is_the_ram_less_the_holes(memory_mib: int) -> None:
    ranges = memory_map(memory_mib)
    end = 0
    for start, size, _ in ranges:
        assert start >= end
        assert size > 0
        end = start + size
    ram = layout.ram_ranges(memory_mib)
    assert sum(size for _, size in ram) == memory_mib << 20
    usable = sum(size for _, size, kind in ranges if kind == 1)
    assert usable == (memory_mib << 20) - layout.HIGH_MEMORY + layout.LOW_MEMORY_END
    for start, size, kind in ranges:
        inside = any(low <= start and start + size <= low + length for low, length in ram)
        assert inside == (kind in (1, 3))
    window, size = layout.pci_window_64(memory_mib)
    assert window >= max(end, layout.HIGH_RAM)
    assert window % size == 0


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (b"", "neither a bzImage nor an ELF"),
        (b"\x7fELF", "truncated"),
        (elf_kernel()[:100], "truncated"),
        (elf_kernel()[:-1], "truncated"),
        (elf_kernel(machine=183), "no ELF kernel for x86-64"),
        (elf_kernel(notes=b""), "no PVH entry"),
        (elf_kernel(notes=pvh_note(name=b"GNU\0")), "no PVH entry"),
        (elf_kernel(notes=pvh_note(kind=1)), "no PVH entry"),
        (elf_kernel(notes=pvh_note()[:-3]), "no PVH entry"),
        (elf_kernel(notes=pvh_note(entry=0x50)), "outside of it"),
        (elf_kernel(segments=((0x100000, TEXT, 8),)), "segments make no sense"),
        (elf_kernel(segments=((0x100000, TEXT, 200), (0x100010, b"x", 1))), "make no sense"),
        (elf_kernel(segments=((0x1000, TEXT, 0x200000),)), "below 1 MiB"),
        (elf_kernel(segments=()), "outside of it"),
    ],
)
def test_a_bad_kernel_is_told_by_its_name(kernel: bytes, reason: str) -> None:
    with pytest.raises(AssetNotFound, match=f"test: .*{reason}"):
        boot(guest_memory(), kernel)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_kernel_is_an_asset_error_or_boots(data: st.DataObject) -> None:
    kernel = bytearray(elf_kernel())
    for position in data.draw(st.lists(st.integers(0, len(kernel) - 1), max_size=6)):
        kernel[position] = data.draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)))
    del kernel[data.draw(st.integers(0, len(kernel))) :]
    try:
        load_linux(guest_memory(), io.BytesIO(kernel), None, cmdline="", vcpus=1)
    except (AssetNotFound, ConfigError):
        pass


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_anything_may_be_given_for_a_kernel(tail: bytes) -> None:
    with pytest.raises(AssetNotFound):
        read_pvh_kernel(io.BytesIO(b"\x7fELF\x02\x01\x01" + tail), "test")


@pytest.mark.parametrize(
    ("kernel", "initramfs"),
    [
        (elf_kernel(segments=((0x100000, TEXT, 2 << 20),)), None),
        (elf_kernel(segments=((0x100000, TEXT, 1 << 63),)), None),
        (elf_kernel(segments=((0x100000, TEXT, 1 << 20),)), b"x"),
        (elf_kernel(), bytes(2 << 20)),
    ],
)
def test_too_little_memory_is_a_configuration_error(kernel: bytes, initramfs: bytes | None) -> None:
    with pytest.raises(ConfigError, match="2 MiB of memory are too little") as caught:
        boot(guest_memory(), kernel, initramfs)
    found = re.search(r"; give it at least (\d+)$", str(caught.value))
    assert found is not None
    end = read_pvh_kernel(io.BytesIO(kernel), "test").end
    assert int(found[1]) * layout.MIB >= end + 2 * len(initramfs or b"")
    if end < 1 << 60:
        boot(guest_memory(int(found[1])), kernel, initramfs)


def test_a_command_line_is_as_long_as_the_kernel_reads() -> None:
    memory = guest_memory()
    boot(memory, elf_kernel(), cmdline="x" * 2047)
    assert memory.read(layout.COMMAND_LINE + 2040, 8) == b"x" * 7 + b"\0"
    for bad in ("x" * 2048, "a\0b"):
        with pytest.raises(ConfigError, match="command line"):
            boot(memory, elf_kernel(), cmdline=bad)


def test_a_file_is_read_in_pieces_if_it_comes_in_pieces() -> None:
    class Slow(io.BytesIO):
        def readinto(self, buffer: object) -> int:
            return super().readinto(memoryview(buffer)[:7])  # type: ignore[arg-type]

    memory = guest_memory()
    load_linux(memory, Slow(elf_kernel()), Slow(b"initramfs"), cmdline="", vcpus=1)
    assert memory.read(0x100000, len(TEXT)) == TEXT
