"""Linux boots from the memory that we fill and the tables that we write, on QEMU's hardware.

QEMU's ``microvm`` has its interrupt controllers, UART and PCI bridge where our machine has them,
so a memory image and eleven instructions of firmware are enough. Our power registers are a
device that ends QEMU with what was written.
"""

from __future__ import annotations

import io
import mmap
import re
import shutil
import struct
from pathlib import Path

import pytest
import trio

from trio_supermachine.devices.memory import GuestMemory
from trio_supermachine.devices.power import RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_TYPE_S5
from trio_supermachine.guest import launcher_binary
from trio_supermachine.hv.kvm.x86 import layout
from trio_supermachine.hv.kvm.x86.boot import BootRegisters, load_linux
from trio_supermachine.hv.qemu.command import CPU, MACHINE, kernel_command_line
from trio_supermachine.hv.qemu.probe import tsc_khz

from ..support.qemu_guest import scripted

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs QEMU"),
]

MEMORY_MIB = 256
VCPUS = 2
FIRMWARE = 0xFFFF0000  # its last 64 KiB below 4 GiB
#: Seconds after which a guest has not ended itself.
PATIENCE = 90


def firmware(registers: BootRegisters) -> bytes:
    """From the reset vector to 32-bit protected mode with these registers."""
    image = bytearray(0x10000)
    flat_code, flat_data = 0x00CF9B000000FFFF, 0x00CF93000000FFFF
    struct.pack_into("<QQQ", image, 0x100, 0, flat_code, flat_data)
    struct.pack_into("<HI", image, 0x140, 23, FIRMWARE + 0x100)
    real = bytes.fromhex(
        "fa"  # cli
        "66 2e 0f 01 16 40 01"  # lgdt cs:[0x140]
        "0f 20 c0 0c 01 0f 22 c0"  # cr0 |= PE
        "66 ea"  # jmp 8:FIRMWARE+0x200
    ) + struct.pack("<IH", FIRMWARE + 0x200, 8)
    protected = (
        bytes.fromhex("66 b8 10 00 8e d8 8e c0 8e d0 8e e0 8e e8")  # ds, es, ss, fs, gs = 0x10
        + b"\xbb"  # mov ebx
        + struct.pack("<I", registers.rbx)
        + b"\xb8"  # mov eax
        + struct.pack("<I", registers.rip)
        + bytes.fromhex("ff e0")  # jmp eax
    )
    image[: len(real)] = real
    image[0x200 : 0x200 + len(protected)] = protected
    image[0xFFF0:0xFFF3] = b"\xe9" + struct.pack("<h", 13)  # jmp 0
    return bytes(image)


async def run(directory: Path, script: str, register: int) -> tuple[int, str]:
    """Boot it; gives what was written to one of the power registers at last, and the console."""
    spec = await scripted(directory, script)
    assert spec.kernel is not None
    assert spec.initramfs is not None
    image = directory / "memory"
    with image.open("w+b") as file:
        file.truncate(MEMORY_MIB << 20)
        with (
            mmap.mmap(file.fileno(), MEMORY_MIB << 20) as mapping,
            memoryview(mapping) as view,
            io.FileIO(spec.kernel) as kernel,
            io.FileIO(spec.initramfs) as initramfs,
        ):
            memory = GuestMemory([(0, view)])
            # What a busy host can disturb is measured before; and ACPI is to reset the machine.
            words = kernel_command_line(spec, await tsc_khz(launcher_binary()))
            registers = load_linux(
                memory, kernel, initramfs, cmdline=f"{words} reboot=acpi", vcpus=VCPUS
            )
            memory.close()
    (directory / "firmware").write_bytes(firmware(registers))
    backend = f"memory-backend-file,id=mem,size={MEMORY_MIB}M,mem-path={image},share=on"
    command = [
        "qemu-system-x86_64",
        *("-M", f"{MACHINE},rtc=off,x-option-roms=off,memory-backend=mem"),
        *("-object", backend, "-m", f"{MEMORY_MIB}M", "-smp", str(VCPUS)),
        *("-accel", "tcg", "-cpu", CPU, "-bios", str(directory / "firmware")),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-serial", "stdio"),
        *("-device", f"isa-debug-exit,iobase={layout.POWER_PORT + register},iosize=1"),
    ]
    with trio.fail_after(PATIENCE):
        ended = await trio.run_process(command, capture_stdout=True, check=False)
    image.unlink()
    # The device ends QEMU with twice the value and one.
    return ended.returncode >> 1, ended.stdout.decode(errors="replace").replace("\r", "")


LOOK = """
cat /proc/iomem /proc/interrupts
ls /sys/bus/acpi/devices /sys/bus/pci/devices
echo online $(cat /sys/devices/system/cpu/online)
dmesg | grep -i "is a 16550A\\|firmware bug\\|acpi.*error\\|acpi.*warning"
echo looked
"""


async def test_linux_finds_the_machine_and_powers_it_off(tmp_path: Path) -> None:
    written, console = await run(tmp_path, LOOK + "poweroff -f\n", SLEEP_CONTROL)
    assert written == SLEEP_TYPE_S5 << 2 | 1 << 5, console
    for expected in (
        "PCI ECAM 0000 [bus 00-00]",
        "c0000000-dfffffff : PCI Bus 0000:00",
        "400000000-7ffffffff : PCI Bus 0000:00",
        "0000:00:00.0",
        "PNP0501:00",
        "PNP0A08:00",
        "ttyS0 at I/O 0x3f8",
        "online 0-1",
    ):
        assert expected in console
    assert not re.search("(?i)firmware bug|acpi.*(error|warning)", console)


async def test_linux_resets_the_machine(tmp_path: Path) -> None:
    written, console = await run(tmp_path, "reboot -f\n", RESET)
    assert written == RESET_VALUE, console
