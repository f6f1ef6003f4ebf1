"""QEMU's command line for a :class:`MachineSpec`, without I/O.

The only host paths in it are those of the kernel and the initramfs, which QEMU takes as plain
arguments. Disks and channels are descriptors that the process inherits. So no name can be
misread as an option, and the files are the ones that were opened.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import attrs

from ...errors import ConfigError
from ..base import COMMON_WORDS, MachineSpec
from .firmware import FIRMWARE

#: Name of the virtio-serial port that carries vsock packets; the guest looks for it.
VSOCK_PORT_NAME: Final = "org.trio-supermachine.vsock"

#: MiB of translated code that QEMU keeps; beyond, it starts over. Its own default is an eighth of
#: the host's memory, up to 1 GiB *for each machine*, and it fills up over a guest's life.
TB_SIZE_MIB: Final = 128

# Slot 0 is the host bridge, slot 1 has the channel and the random number generator; disks take
# the others, eight functions each.
_FIRST_DISK_SLOT: Final = 2
_FUNCTIONS: Final = 8
MAX_DISKS: Final = (32 - _FIRST_DISK_SLOT) * _FUNCTIONS

# A disk takes two interrupt vectors, and a processor has about 200 in all. Disks beyond these
# share the four interrupt lines of the bus.
_DISKS_WITH_VECTORS: Final = 64

_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

#: The processor, without "enhanced rep movsb". A kernel that is promised a fast one copies memory
#: with it, and TCG moves byte by byte. A virtio-serial port carries three times as much without.
CPU: Final = "max,erms=off,fsrm=off"

#: The machine type. No "pit": the guest has better timers, and this one would wake QEMU 36 times a
#: second. "suppress-vmdesc": only the same version reads a saved state, which therefore needs no
#: description of itself.
MACHINE: Final = "microvm,acpi=on,pcie=on,pit=off,suppress-vmdesc=on"

#: Words that the engine adds to the kernel's command line.
_CMDLINE: Final = (
    *COMMON_WORDS,
    # Emulated processors do not speculate: mitigations would cost time for nothing.
    "mitigations=off",
    # The timer check and the calibration of the TSC against an emulated timer fail at random
    # when the host is busy, and the kernel then hangs.
    "no_timer_check",
    # The kernel's watchdog of the TSC takes the clock for broken when the host is busy, and the
    # guest would then tick 200 times a second for ever.
    "tsc=reliable",
)


@attrs.frozen(kw_only=True)
class RestoreFds:
    """Descriptors of the files that a machine goes on from."""

    state: int
    memory: int


@attrs.frozen(kw_only=True)
class MachineFds:
    """Descriptors that QEMU inherits."""

    qmp: int
    console: int
    vsock: int
    disks: tuple[int, ...] = ()
    restore: RestoreFds | None = None

    @property
    def all(self) -> tuple[int, ...]:
        state = (self.restore.state, self.restore.memory) if self.restore else ()
        return (self.qmp, self.console, self.vsock, *self.disks, *state)


def kernel_command_line(spec: MachineSpec, tsc_khz: int | None) -> str:
    """Give the guest kernel's: first the engine's words, then the caller's, which win."""
    words = [*_CMDLINE]
    if tsc_khz is not None:
        words.append(f"tsc_early_khz={tsc_khz}")
    if spec.cmdline:
        words.append(spec.cmdline)
    return " ".join(words)


def command_line(
    qemu: Path, spec: MachineSpec, fds: MachineFds, *, tsc_khz: int | None
) -> list[bytes]:
    """Give QEMU's arguments for ``spec``, from the program on.

    :param tsc_khz: the host's TSC frequency, which is the guest's under emulation.
    :raises ConfigError: more disks than the machine has places for.
    """
    if len(spec.disks) > MAX_DISKS:
        raise ConfigError(f"{len(spec.disks)} disks; the most is {MAX_DISKS}")
    threads = "multi" if spec.vcpus > 1 else "single"
    arguments: list[str | bytes] = [
        os.fsencode(qemu),
        *("-M", f"{MACHINE},memory-backend=memory"),
        *("-bios", FIRMWARE),
        *("-accel", f"tcg,thread={threads},tb-size={TB_SIZE_MIB}"),
        *("-cpu", CPU),
        *("-smp", str(spec.vcpus)),
        *("-m", f"{spec.memory_mib}M"),
        *_memory(spec, fds),
        *("-sandbox", _SANDBOX),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        # Device state is saved without the section that would name the machine type.
        *("-global", "migration.send-configuration=off"),
        *_start(spec, fds, tsc_khz),
        *("-chardev", f"socket,id=qmp,fd={fds.qmp}"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,fd={fds.console}"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=vsock,fd={fds.vsock}"),
        *_device("virtio-serial-pci", "serial", slot=1, function=0, properties={"max_ports": 2}),
        *("-device", json.dumps(_vsock_port())),
        *_object("rng-builtin", "entropy"),
        *_device("virtio-rng-pci", "rng", slot=1, function=1, properties={"rng": "entropy"}),
    ]
    for index, (disk, fd) in enumerate(zip(spec.disks, fds.disks, strict=True)):
        slot, function = divmod(index, _FUNCTIONS)
        name = f"disk{index}"
        arguments += [
            *("-add-fd", f"fd={fd},set={index}"),
            *("-blockdev", json.dumps(_block_node(name, index, disk.readonly))),
            *_device(
                "virtio-blk-pci",
                f"vd{index}",
                slot=_FIRST_DISK_SLOT + slot,
                function=function,
                properties={
                    "drive": name,
                    "num-queues": 1,
                    "vectors": 2 if index < _DISKS_WITH_VECTORS else 0,
                },
            ),
        ]
    return [os.fsencode(argument) for argument in arguments]


def _memory(spec: MachineSpec, fds: MachineFds) -> tuple[str, str]:
    size = spec.memory_mib << 20
    if fds.restore is None:
        return _object("memory-backend-ram", "memory", size=size, dump=False)
    path = f"/proc/self/fd/{fds.restore.memory}"
    return _object(
        "memory-backend-file",
        "memory",
        **{"size": size, "mem-path": path, "share": False, "dump": False},
    )


def _start(spec: MachineSpec, fds: MachineFds, tsc_khz: int | None) -> list[str | bytes]:
    """Give the arguments for the kernel to boot, or the state to wait for."""
    if fds.restore is not None:
        return ["-S", "-incoming", "defer"]
    if spec.kernel is None or spec.initramfs is None:
        raise ConfigError("a machine boots a kernel with an initramfs, or is restored")
    return [
        *("-kernel", os.fsencode(spec.kernel.absolute())),
        *("-initrd", os.fsencode(spec.initramfs.absolute())),
        *("-append", kernel_command_line(spec, tsc_khz)),
    ]


def _object(kind: str, name: str, **properties: object) -> tuple[str, str]:
    return "-object", json.dumps({"qom-type": kind, "id": name, **properties})


def _device(
    driver: str, name: str, *, slot: int, function: int, properties: dict[str, Any]
) -> tuple[str, str]:
    device = {
        "driver": driver,
        "id": name,
        "bus": "pcie.0",
        "addr": f"{slot:#x}.{function}",
        "multifunction": True,
        "disable-legacy": "on",
        **properties,
    }
    return "-device", json.dumps(device)


def _vsock_port() -> dict[str, Any]:
    return {
        "driver": "virtserialport",
        "id": "vsock-port",
        "bus": "serial.0",
        "nr": 1,
        "chardev": "vsock",
        "name": VSOCK_PORT_NAME,
    }


def _block_node(name: str, fd_set: int, readonly: bool) -> dict[str, Any]:
    return {
        "driver": "raw",
        "node-name": name,
        "read-only": readonly,
        "file": {
            "driver": "file",
            "filename": f"/dev/fdset/{fd_set}",
            "read-only": readonly,
        },
    }
