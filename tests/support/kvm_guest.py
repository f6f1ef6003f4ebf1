"""Guests for tests of the KVM machine: of some instructions, or Linux with a program in C.

The tiny ones need no hardware virtualization: they run wherever ``/dev/kvm`` opens.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import attrs
import pytest
import trio

from trio_supermachine.hv.base import MachineSpec

from ..pure.test_x86_boot import ENTRY, elf_kernel
from .processes import open_files
from .qemu_guest import scripted
from .tiny_guest import open_kvm

#: A size that nothing else in this process has, to recognise guest memory by.
MEMORY_MIB = 37

_TEXT = 0x100000

# In protected mode, without paging, interrupts off.
SPIN = bytes.fromhex("eb fe")
SLEEP = bytes.fromhex("fa f4 eb fc")  # cli; hlt
PORT_LOOP = bytes.fromhex("e6 80 eb fc")  # out 0x80, al
MEMORY_LOOP = bytes.fromhex("a1 00 00 00 e0 eb f9")  # the host bridge's identification
CONSOLE_LOOP = bytes.fromhex("66 ba f8 03 b0 78 ee eb fd")
SHUTDOWN = bytes.fromhex("66 ba 00 06 b0 34 ee") + SPIN
RESET = bytes.fromhex("66 ba 02 06 b0 01 ee") + SPIN
KEYBOARD_RESET = bytes.fromhex("b0 fe e6 64") + SPIN
TRIPLE_FAULT = bytes.fromhex("0f 0b")  # an undefined instruction, and no handler of anything
#: Counts in memory, and says so: a letter, then the next.
COUNT = bytes.fromhex(
    "66 ba f8 03"  # mov dx, 0x3f8
    "a1 00 00 20 00"  # again: mov eax, [2 MiB]
    "40 83 e0 0f"  # inc eax; and eax, 15
    "a3 00 00 20 00"  # mov [2 MiB], eax
    "04 61 ee"  # add al, 'a'; out dx, al
    "eb ed"
)


def say(text: bytes) -> bytes:
    """Instructions that write ``text`` to the console."""
    return bytes.fromhex("66 ba f8 03") + b"".join(bytes([0xB0, byte, 0xEE]) for byte in text)


def tiny_spec(directory: Path, code: bytes, *, vcpus: int = 1) -> MachineSpec:
    """A machine whose kernel is ``code``; or the test is skipped."""
    open_kvm().close()
    kernel, initramfs = directory / "kernel", directory / "initramfs"
    text = bytes(ENTRY - _TEXT) + code
    kernel.write_bytes(elf_kernel(segments=((_TEXT, text, len(text)),)))
    initramfs.write_bytes(b"none")
    return MachineSpec(kernel=kernel, initramfs=initramfs, memory_mib=MEMORY_MIB, vcpus=vcpus)


async def scripted_with(
    directory: Path, script: str, *sources: Path, memory_mib: int = 128
) -> MachineSpec:
    """A Linux whose init runs ``script``, with a program in ``/bin`` of each C source."""
    spec = await scripted(directory, script)
    assert spec.initramfs is not None
    added = await trio.to_thread.run_sync(_compiled, directory / "more", sources)
    with spec.initramfs.open("ab") as archive:  # the kernel unpacks one after the other
        archive.write(added)
    return attrs.evolve(spec, memory_mib=memory_mib)


def _compiled(directory: Path, sources: tuple[Path, ...]) -> bytes:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (directory / "bin").mkdir(parents=True)
    for source in sources:
        target = directory / "bin" / source.stem
        command = [compiler, "-static", "-O1", "-o", str(target), str(source)]
        subprocess.run(command, check=True)
    names = "\n".join(f"bin/{source.stem}" for source in sources)
    return subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"],
        cwd=directory,
        input=names.encode(),
        capture_output=True,
        check=True,
    ).stdout


def remains(memory_mib: int = MEMORY_MIB) -> list[str]:
    """What this process has of machines with that much memory."""
    found = [
        f"descriptor of {what}"
        for what in open_files().values()
        if "kvm" in what or "eventfd" in what
    ]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.partition(" ")[0].partition("-")
        size = int(end, 16) - int(start, 16)
        if "kvm" in line.rpartition(" ")[2].rpartition("/")[2] and ".so" not in line:
            found.append(f"mapping {line}")
        elif size == memory_mib << 20:
            found.append(f"guest memory {line}")
    found += [f"thread {t.name}" for t in threading.enumerate() if t.name.startswith("vcpu")]
    return found
