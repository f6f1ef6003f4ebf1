"""On QEMU nothing that a guest needs lies over something else, whatever the sizes are."""

from __future__ import annotations

import hashlib
import io
import re
import struct
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.errors import ConfigError
from trio_supermachine.host.assets import AssetPaths
from trio_supermachine.hv.base import MachineSpec
from trio_supermachine.hv.kvm.x86.elf import read_pvh_kernel
from trio_supermachine.hv.qemu.engine import QemuEngine
from trio_supermachine.hv.qemu.firmware import FIRMWARE, check_room, initramfs_start
from trio_supermachine.kernels import prepare_kernel
from trio_supermachine.kernels.image import KernelExtent, kernel_extent

from ..pure.test_x86_boot import elf_kernel
from ..support.qemu_guest import console_until, scripted

PAGE = 4096
MIB = 1 << 20
LOW_MEMORY_MOST = 3 << 30
#: A kernel of 16 MiB at 16 MiB.
KERNEL = KernelExtent(end=32 * MIB)


def low_memory_end(memory_mib: int) -> int:
    return min(memory_mib * MIB, LOW_MEMORY_MOST)


@pytest.mark.parametrize("memory_mib", [64, 256, 3071, 3072, 3073, 4096])
def test_every_size_modulo_a_page_has_a_place_of_its_own(memory_mib: int) -> None:
    for size in range(5 * MIB, 5 * MIB + PAGE):
        start = initramfs_start(KERNEL, size, memory_mib)
        assert start % PAGE == 0
        assert KERNEL.end <= start
        assert start + size < low_memory_end(memory_mib)


@given(st.integers(1, 200 * MIB), st.integers(1, 4096), st.integers(0, 150 * MIB))
def test_room_is_refused_exactly_where_there_is_none(
    tmp_path_factory: pytest.TempPathFactory, end: int, memory_mib: int, size: int
) -> None:
    directory = tmp_path_factory.mktemp("room")
    kernel, initramfs = directory / "kernel", directory / "initramfs"
    kernel.write_bytes(elf_kernel(segments=((0, b"x", end),)))
    with initramfs.open("wb") as file:
        file.truncate(size)
    start = initramfs_start(KernelExtent(end=end), size, memory_mib)
    if start >= end:
        check_room(kernel, initramfs, memory_mib)
        return
    with pytest.raises(ConfigError, match=f"^{memory_mib} MiB of memory are too little") as caught:
        check_room(kernel, initramfs, memory_mib)
    found = re.search(r"alone take (\d+); give it at least (\d+),", str(caught.value))
    assert found is not None
    check_room(kernel, initramfs, int(found[1]))
    assert int(found[2]) * MIB >= end + 2 * size
    check_room(kernel, initramfs, int(found[2]))


def test_a_bzimage_may_want_its_initramfs_lower(tmp_path: Path) -> None:
    header = bytearray(1 << 20)
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<I", header, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<QI", header, 0x258, 16 * MIB, 30 * MIB)
    path = tmp_path / "bzImage"
    path.write_bytes(header)
    extent = kernel_extent(path)
    assert extent == KernelExtent(end=46 * MIB, initramfs_max=0x7FFFFFFF)
    assert initramfs_start(extent, 5000, 4096) == (2 << 30) - 2 * PAGE
    assert initramfs_start(extent, 5000, 1024) == (1 << 30) - 2 * PAGE


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"nonsense" * 100, bytes(0x202) + b"HdrS"])
def test_what_is_no_kernel_is_left_to_qemu(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    assert kernel_extent(path) is None
    check_room(path, path, 1)
    check_room(tmp_path / "missing", path, 1)


@pytest.mark.vm
async def test_a_kernel_ends_where_its_segments_do() -> None:
    boot = await prepare_kernel()
    content = boot.kernel.read_bytes()
    extent = kernel_extent(boot.kernel)
    assert extent == KernelExtent(end=read_pvh_kernel(io.BytesIO(content), "kernel").end)


_LOOK = """\
dmesg | grep -E 'ACPI: [A-Z]{4} 0x|RAMDISK: '
echo last $(sha256sum </last)
echo end; sleep 1000
"""


def member(name: bytes, data: bytes = b"") -> bytes:
    """A file in an archive of the format "newc"."""
    fields = (1, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def fill(initramfs: Path, residue: int) -> tuple[int, str]:
    """Append a file ``last``, so that the size is ``residue`` modulo a page.

    Gives the size, and the file's digest. Only up to three zeros follow the archive's end.
    """
    size = initramfs.stat().st_size
    overhead = len(member(b"last") + member(b"TRAILER!!!"))
    data = b"x" * ((residue - size - overhead) % PAGE // 4 * 4 + PAGE)
    with initramfs.open("ab") as file:
        file.write(member(b"last", data) + member(b"TRAILER!!!"))
        size = file.tell()
        size += (residue - size) % PAGE
        file.truncate(size)
    return size, hashlib.sha256(data).hexdigest()


async def least_memory(spec: MachineSpec) -> int:
    """The least memory, in MiB, that Linux can run in, and no less than 64."""
    assert spec.kernel is not None
    assert spec.initramfs is not None
    extent = kernel_extent(spec.kernel)
    assert extent is not None
    # Its files are unpacked beside the archive, and the kernel wants some memory to work with.
    return max(64, (extent.end + 2 * spec.initramfs.stat().st_size) // MIB + 24)


# SeaBIOS has its tables from 0x280 of the last page on, and those that Linux reads from 0xe32.
@pytest.mark.vm
@pytest.mark.parametrize(
    ("residue", "memory_mib"),
    [(0, 256), (1, None), (0xE33, 256), (4095, 3073), (4092, 4096)],
)
async def test_tables_and_initramfs_are_both_whole(
    tmp_path: Path, residue: int, memory_mib: int | None
) -> None:
    spec = await scripted(tmp_path, _LOOK)
    assert spec.initramfs is not None
    size, digest = fill(spec.initramfs, residue)
    memory_mib = memory_mib or await least_memory(spec)
    assert spec.kernel is not None
    extent = kernel_extent(spec.kernel)
    assert extent is not None
    async with QemuEngine().open(attrs.evolve(spec, memory_mib=memory_mib)) as machine:
        seen = (await console_until(machine, b"end\r\n")).decode()
    tables = [int(address, 16) for address in re.findall(r"ACPI: [A-Z]{4} 0x([0-9A-F]+)", seen)]
    assert len(tables) >= 4  # RSDP, XSDT, FACP, DSDT
    assert max(tables) < MIB
    (first, last) = re.findall(r"RAMDISK: \[mem 0x([0-9a-f]+)-0x([0-9a-f]+)\]", seen)[0]
    start = initramfs_start(extent, size, memory_mib)
    assert int(first, 16) == start
    assert start + size - 1 <= int(last, 16) < low_memory_end(memory_mib)
    assert f"last {digest}" in seen


@pytest.mark.vm
async def test_the_firmware_is_there_and_is_told() -> None:
    report = await QemuEngine().probe()
    firmware = report.detail.rpartition("firmware ")[2]
    assert firmware.startswith("/")
    assert firmware.endswith(f"/{FIRMWARE}")


def program(prefix: Path) -> Path:
    """A program that answers a probe as QEMU does, with two places for its files."""
    qemu = prefix / "bin/qemu-system-x86_64"
    qemu.parent.mkdir()
    qemu.write_text(f"""#!/bin/sh
case "$*" in
    --version) echo QEMU emulator version 9.0.0 ;;
    "-machine help") echo microvm x ;;
    "-L help") echo /nowhere; echo {prefix}/elsewhere ;;
esac
""")
    qemu.chmod(0o755)
    return qemu


async def test_a_qemu_without_the_firmware_is_refused(tmp_path: Path) -> None:
    qemu = program(tmp_path)
    report = await QemuEngine(AssetPaths(qemu=qemu)).probe()
    assert not report.available
    assert report.detail == f"QEMU 9.0 ({qemu}) has no firmware {FIRMWARE}"
    assert report.remedy is not None
    assert "qemu-system-data" in report.remedy


@pytest.mark.parametrize("place", ["share/qemu", "elsewhere"])
async def test_the_firmware_is_found_beside_qemu_or_where_it_looks(
    tmp_path: Path, place: str
) -> None:
    qemu = program(tmp_path)
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / FIRMWARE).touch()
    report = await QemuEngine(AssetPaths(qemu=qemu)).probe()
    assert report.available
    assert report.detail.endswith(f"firmware {tmp_path / place / FIRMWARE}")
