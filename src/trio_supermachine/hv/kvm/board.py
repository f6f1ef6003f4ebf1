"""The board: all hardware of one machine, its memory, vCPUs, interrupt controllers and devices.

*Order.* The kernel's machine holds memory of this process. So memory is made first and unmapped
last, and the kernel's machine is closed before the descriptors of devices. A restored machine's
memory is complete before its devices load their state, as they look at their rings in it.

*The lock* is held by whoever touches registers of devices: vCPUs' threads in their exits, and the
Trio thread for a reset, an interrupt or a capture. Nobody waits for a thread while holding it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, final

from ..._util.trace import trace
from ...devices.blk import BlkDevice
from ...devices.bus import Bus, Range
from ...devices.pci import PciBus
from ...devices.power import AcpiPower, KeyboardReset, PowerEvent
from ...devices.rng import RngDevice
from ...devices.serial import Serial
from ...devices.virtio import VirtioDevice
from ...devices.vsock import VsockDevice
from ...errors import ConfigError
from ...vsock.stream import VsockMux
from ..base import COMMON_WORDS, Disk, MachineSpec
from .api import Kvm, KvmVcpu
from .device import MachineDevice
from .memory import MachineMemory
from .routes import InterruptRoutes
from .state import restore_vcpus, restore_vm, save_vcpus, save_vm
from .state_format import decode_state, encode_state
from .vcpu import ExitHandlers
from .x86 import layout
from .x86.boot import BOOT_MSRS, BootRegisters, SegmentRegister, load_linux
from .x86.cpuid import address_bits, vcpu_cpuid

# Places are those of the QEMU engine: slot 0 is the host bridge, slot 1 has the channel and the
# random number generator; disks take the others, eight functions each.
_FIRST_DISK_SLOT: Final = 2
_FUNCTIONS: Final = 8
# Devices of the program's own are in the last slot.
_OWN_SLOT: Final = 31
#: A disk takes two interrupt vectors, and a processor has about 200 in all.
MAX_DISKS: Final = 80

_CMDLINE: Final = (*COMMON_WORDS, "supermachine.channel=vsock")


@final
class Board:
    """The hardware of ``spec``, standing still: with its kernel loaded, or its state to go on from.

    To make one blocks for some milliseconds: do it in a thread.

    :param own: the devices that ``spec.devices`` have made.
    :param console: gets the console's output, in a vCPU's thread.
    :param power: told that the guest wants to end, in a vCPU's thread.
    :ivar lock: held by whoever touches registers of devices.
    :ivar mux: the connections of the machine.
    :ivar memory: the machine's memory.
    :ivar vcpus: the vCPUs, in the order of their APIC ids.
    :raises OSError: KVM refused something, which the error names; or a file cannot be read.
    :raises ConfigError: more disks or vCPUs than there are places, or too little memory.
    :raises AssetNotFound: the kernel cannot be used.
    :raises ValueError: the file to go on from has no state of such a machine.
    """

    def __init__(
        self,
        spec: MachineSpec,
        own: Sequence[VirtioDevice] = (),
        *,
        console: Callable[[bytes], None],
        power: Callable[[PowerEvent], None],
    ) -> None:
        if len(spec.disks) > MAX_DISKS:
            raise ConfigError(f"{len(spec.disks)} disks; the KVM engine has {MAX_DISKS} at most")
        self.lock: threading.Lock = threading.Lock()
        vsock = VsockDevice()
        self.mux: VsockMux = VsockMux(vsock)
        # On failure, too, the kernel's machine goes first and memory last.
        with ExitStack() as stack, ExitStack() as machine:
            restore = spec.restore
            self._stack = stack
            self.memory: MachineMemory = MachineMemory(
                spec.memory_mib, restore.memory if restore else None
            )
            stack.callback(self.memory.close)
            if restore is not None:
                self.memory.patch(restore.patches)
            self._kvm = machine.enter_context(Kvm.open())
            self._vm = machine.enter_context(self._kvm.create_vm())
            self._vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
            self._vm.set_tss_addr(layout.KVM_TSS)
            self._vm.create_irqchip()
            self._vm.create_pit()
            self.memory.give_to(self._vm)
            self._routes = InterruptRoutes(self._vm)
            self.devices: list[MachineDevice] = []
            self._pci = PciBus(*layout.pci_window_64(spec.memory_mib))
            self._add(vsock, 1, 0)
            self._add(RngDevice(), 1, 1)
            for index, disk in enumerate(spec.disks):
                slot, function = divmod(index, _FUNCTIONS)
                self._add(self._open(disk), _FIRST_DISK_SLOT + slot, function)
            for function, device in enumerate(own):
                self._add(device, _OWN_SLOT, function)
            self._serial = Serial(console, self._serial_interrupt)
            self._ports = Bus(
                (
                    Range(layout.SERIAL_PORT, layout.SERIAL_PORTS, self._serial),
                    Range(layout.KEYBOARD_PORT, layout.KEYBOARD_PORTS, KeyboardReset(power)),
                    Range(layout.POWER_PORT, layout.POWER_PORTS, AcpiPower(power)),
                )
            )
            self._registers = Bus((Range(layout.PCI_ECAM, layout.PCI_ECAM_SIZE, self._pci),))
            self.vcpus: tuple[KvmVcpu, ...] = tuple(
                self._vm.create_vcpu(index) for index in range(spec.vcpus)
            )
            if restore is None:
                self._boot(spec)
            else:
                self._load(restore.state)
            stack.push(machine.pop_all())
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Give everything back. vCPUs and devices have ended."""
        self._stack.close()

    def _open(self, disk: Disk) -> BlkDevice:
        fd = os.open(disk.path, (os.O_RDONLY if disk.readonly else os.O_RDWR) | os.O_CLOEXEC)
        self._stack.callback(os.close, fd)
        return BlkDevice(fd, readonly=disk.readonly)

    def _add(self, device: VirtioDevice, slot: int, function: int) -> None:
        added = MachineDevice(device, self.memory.guest, self._vm, self._routes, self.lock)
        self._stack.callback(added.close)
        self._pci.add(added.function, device=slot, number=function)
        self.devices.append(added)

    # --- the first state ---

    def _boot(self, spec: MachineSpec) -> None:
        if spec.kernel is None or spec.initramfs is None:
            raise ConfigError("a machine boots a kernel with an initramfs, or is restored")
        supported = self._kvm.supported_cpuid()
        bits = address_bits(supported)
        if sum(layout.pci_window_64(spec.memory_mib)) > 1 << bits:
            message = f"{spec.memory_mib} MiB of memory: the host has {bits} bits of address"
            raise ConfigError(message)
        words = [*_CMDLINE, spec.cmdline] if spec.cmdline else _CMDLINE
        with (
            open(spec.kernel, "rb", buffering=0) as kernel,
            open(spec.initramfs, "rb", buffering=0) as initramfs,
        ):
            registers = load_linux(
                self.memory.guest,
                kernel,
                initramfs,
                cmdline=" ".join(words),
                vcpus=spec.vcpus,
                origin=str(spec.kernel),
            )
        deadline = bool(self._kvm.check_extension("KVM_CAP_TSC_DEADLINE_TIMER"))
        for vcpu in self.vcpus:
            vcpu.set_cpuid(
                vcpu_cpuid(
                    supported,
                    index=vcpu.index,
                    vcpus=spec.vcpus,
                    tsc_khz=vcpu.get_tsc_khz(),
                    tsc_deadline=deadline,
                )
            )
            vcpu.set_msrs(BOOT_MSRS.items())
        # The others wait until the first one starts them.
        _set_registers(self.vcpus[0], registers)

    def _load(self, state: Path) -> None:
        header, _, machine = state.read_bytes().partition(b"\n")
        try:
            described = json.loads(header)
        except RecursionError as exc:
            raise ValueError("what describes the devices is nested too deep") from exc
        if (
            not isinstance(described, dict)
            or set(described) != {"serial", "pci"}
            or not all(isinstance(part, dict) for part in described.values())
        ):
            raise ValueError("no state of a machine of this kind")
        vcpus, vm = decode_state(machine)
        with self.lock, self._routes.together():
            self._serial.load(described["serial"])
            self._pci.load(described["pci"])
        for msr in restore_vcpus(self.vcpus, vcpus):
            trace("kvm", "not restored: %s", msr)
        restore_vm(self._vm, vm)

    # --- later states ---

    def save(self) -> bytes:
        """Save all state but memory. vCPUs and devices stand still."""
        machine = encode_state(save_vcpus(self._kvm, self.vcpus), save_vm(self._vm))
        with self.lock:
            described = {
                "serial": self._serial.save(),
                "pci": self._pci.save(),
            }
        return json.dumps(described).encode() + b"\n" + machine

    def flush_console(self) -> None:
        """Send the bytes that the UART still holds. vCPUs stand still."""
        with self.lock:
            self._serial.flush()

    def stood_still(self) -> None:
        """Tell the guest that it did not run for a while, lest its watchdogs complain."""
        for vcpu in self.vcpus:
            vcpu.kvmclock_ctrl()

    # --- exits, in a vCPU's thread ---

    @property
    def handlers(self) -> ExitHandlers:
        """Functions that answer the guest's exits."""
        return ExitHandlers(
            port_in=self._port_in,
            port_out=self._port_out,
            mmio_read=self._mmio_read,
            mmio_write=self._mmio_write,
        )

    def _port_in(self, port: int, size: int) -> int:
        with self.lock:
            return self._ports.read(port, size)

    def _port_out(self, port: int, size: int, value: int) -> None:
        with self.lock:
            self._ports.write(port, size, value)

    def _mmio_read(self, address: int, size: int) -> int:
        with self.lock:
            if (found := self._pci.find(address)) is not None:
                function, offset = found
                return function.read_bar(offset, size)
            return self._registers.read(address, size)

    def _mmio_write(self, address: int, size: int, value: int) -> None:
        with self.lock:
            if (found := self._pci.find(address)) is not None:
                function, offset = found
                function.write_bar(offset, size, value)
            else:
                self._registers.write(address, size, value)

    def _serial_interrupt(self) -> None:
        self._vm.irq_line(layout.SERIAL_GSI, True)
        self._vm.irq_line(layout.SERIAL_GSI, False)


def _set_registers(vcpu: KvmVcpu, boot: BootRegisters) -> None:
    regs = vcpu.get_regs()
    regs.rip, regs.rbx, regs.rflags = boot.rip, boot.rbx, boot.rflags
    vcpu.set_regs(regs)
    sregs = vcpu.get_sregs()
    sregs.cr0, sregs.cr4, sregs.efer = boot.cr0, boot.cr4, boot.efer
    for name in ("ds", "es", "fs", "gs", "ss"):
        _set_segment(getattr(sregs, name), boot.data)
    _set_segment(sregs.cs, boot.cs)
    _set_segment(sregs.tr, boot.tr)
    vcpu.set_sregs(sregs)


def _set_segment(segment: object, value: SegmentRegister) -> None:
    for field in SegmentRegister.__attrs_attrs__:
        setattr(segment, field.name, getattr(value, field.name))
