"""The kernel's KVM interface, as thin classes over :mod:`_kvm`.

Each method is one ioctl, which the kernel's *KVM API documentation* describes, and may be called
from any thread; those of a vCPU wait while it runs. All raise :exc:`OSError` with the ioctl's name,
such as ``KVM_SET_SREGS: Invalid argument``. Importing this module raises :exc:`ImportError` where
the package was built without the binding.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, final

from ._kvm import ffi, lib
from .ioctl import CpuidEntry, Descriptor, call, call_value, read, read_cpuid, write
from .vcpu_handle import VCPU_PARTS, KvmVcpu

__all__ = [
    "IRQCHIPS",
    "IRQCHIP_SIZE",
    "PIT_SIZE",
    "VCPU_PARTS",
    "CpuidEntry",
    "Kvm",
    "KvmVcpu",
    "KvmVm",
    "MsiRoute",
]

_API_VERSION: Final = 12

_IOAPIC_PINS: Final = 24
_PIC_PINS: Final = 16

#: Sizes of the structures of one of the three interrupt controllers, and of the PIT.
IRQCHIP_SIZE: Final = ffi.sizeof("struct kvm_irqchip")
PIT_SIZE: Final = ffi.sizeof("struct kvm_pit_state2")
IRQCHIPS: Final = (lib.KVM_IRQCHIP_PIC_MASTER, lib.KVM_IRQCHIP_PIC_SLAVE, lib.KVM_IRQCHIP_IOAPIC)


class MsiRoute(NamedTuple):
    """MSI message that an interrupt line sends when an irqfd raises it."""

    gsi: int
    address: int
    data: int


@final
class Kvm(Descriptor):
    """The device itself: the abilities of this host's KVM, and new machines."""

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> Kvm:
        """Open the device.

        :raises OSError: it does not open (with the path), or is no KVM of the known interface.
        """
        kvm = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        try:
            found = call_value(kvm._fd, "KVM_GET_API_VERSION")
            if found != _API_VERSION:
                message = f"KVM_GET_API_VERSION: version {found}, and not {_API_VERSION}"
                raise OSError(errno.ENOSYS, message)
        except BaseException:
            kvm.close()
            raise
        return kvm

    def check_extension(self, name: str) -> int:
        """Ask the host for a capability such as ``"KVM_CAP_TSC_CONTROL"``; 0 if it is missing."""
        return call_value(self._fd, "KVM_CHECK_EXTENSION", getattr(lib, name))

    def supported_cpuid(self) -> list[CpuidEntry]:
        """Read all that KVM and the processor support for a guest (KVM_GET_SUPPORTED_CPUID)."""
        return read_cpuid(self._fd, "KVM_GET_SUPPORTED_CPUID")

    def msr_indices(self) -> list[int]:
        """List the MSRs that make up a vCPU's state (KVM_GET_MSR_INDEX_LIST)."""
        count = 0
        while True:
            msrs = ffi.new("struct kvm_msr_list *", {"nmsrs": count, "indices": count})
            try:
                call(self._fd, "KVM_GET_MSR_INDEX_LIST", msrs)
            except OSError as exc:
                if exc.errno != errno.E2BIG:
                    raise
                count = msrs.nmsrs  # how many there are
            else:
                return [msrs.indices[i] for i in range(msrs.nmsrs)]

    def create_vm(self) -> KvmVm:
        """Make a machine without memory, devices and vCPUs."""
        return KvmVm(self, call_value(self._fd, "KVM_CREATE_VM"))


@final
class KvmVm(Descriptor):
    """One machine. Closing it closes its vCPUs, and lets go of the memory given to it."""

    def __init__(self, kvm: Kvm, fd: int) -> None:
        super().__init__(fd)
        self._memory: dict[int, Any] = {}
        self._vcpus: list[KvmVcpu] = []
        try:
            self._run_size = call_value(kvm.fileno(), "KVM_GET_VCPU_MMAP_SIZE")
            # The sizes of XSAVE areas beyond the first 4 KiB are per machine.
            self._xsave_size = self.check_extension("KVM_CAP_XSAVE2")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for vcpu in self._vcpus:
            vcpu.close()
        super().close()
        # Only now can nothing in the guest reach the memory any more.
        for memory in self._memory.values():
            ffi.release(memory)
        self._memory.clear()

    def check_extension(self, name: str) -> int:
        """Ask this machine for a capability; 0 if it is missing."""
        return call_value(self._fd, "KVM_CHECK_EXTENSION", getattr(lib, name))

    def set_tss_addr(self, address: int) -> None:
        """Place three pages that Intel processors need: below 4 GiB, outside of memory."""
        call_value(self._fd, "KVM_SET_TSS_ADDR", address)

    def set_identity_map_addr(self, address: int) -> None:
        """Place one page that Intel processors need, before the first vCPU is made."""
        call(self._fd, "KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", address))

    def create_irqchip(self) -> None:
        """Make two PICs, an IOAPIC, and a local APIC in each later vCPU, all in the kernel."""
        call(self._fd, "KVM_CREATE_IRQCHIP")

    def create_pit(self) -> None:
        """Make a PIT in the kernel, with a port 0x61 that answers."""
        config = ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY})
        call(self._fd, "KVM_CREATE_PIT2", config)

    def set_memory(
        self,
        slot: int,
        address: int,
        memory: mmap.mmap | memoryview | bytearray,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
    ) -> None:
        """Make a writable buffer the guest's memory at a guest-physical address.

        The buffer cannot be unmapped until the machine is closed or the slot is given another.
        Address and size are multiples of the page size.
        """
        held = ffi.from_buffer("char[]", memory, require_writable=True)
        flags = (readonly and lib.KVM_MEM_READONLY) | (log_dirty and lib.KVM_MEM_LOG_DIRTY_PAGES)
        try:
            self._set_region(slot, flags, address, len(held), int(ffi.cast("uintptr_t", held)))
        except BaseException:
            ffi.release(held)
            raise
        before = self._memory.get(slot)
        self._memory[slot] = held
        if before is not None:
            ffi.release(before)

    def remove_memory(self, slot: int) -> None:
        """Take a slot's memory away from the guest, and let go of its buffer."""
        self._set_region(slot, 0, 0, 0, 0)
        ffi.release(self._memory.pop(slot))

    def _set_region(self, slot: int, flags: int, address: int, size: int, host: int) -> None:
        region = ffi.new("struct kvm_userspace_memory_region *", (slot, flags, address, size, host))
        call(self._fd, "KVM_SET_USER_MEMORY_REGION", region)

    def dirty_log(self, slot: int) -> bytes:
        """Give a bit for each page of a slot with ``log_dirty``: written since the last call."""
        size = (len(self._memory[slot]) // 4096 + 63) // 64 * 8
        bitmap = bytearray(size)
        with ffi.from_buffer("char[]", bitmap, require_writable=True) as target:
            log = ffi.new("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": target})
            call(self._fd, "KVM_GET_DIRTY_LOG", log)
        return bytes(bitmap)

    def ioeventfd(
        self,
        eventfd: int,
        address: int,
        *,
        length: int = 0,
        datamatch: int | None = None,
        port: bool = False,
        deassign: bool = False,
    ) -> None:
        """Let a guest's write signal an eventfd instead of leaving the guest.

        :param length: bytes of the write: 1, 2, 4, 8, or 0 for any.
        :param datamatch: only this value counts; needs a length.
        :param port: the address is a port, not one of memory.
        :param deassign: take it back; all else as it was assigned.
        """
        flags = (port and lib.KVM_IOEVENTFD_FLAG_PIO) | (
            deassign and lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        )
        if datamatch is not None:
            flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        event = (datamatch or 0, address, length, eventfd, flags)
        call(self._fd, "KVM_IOEVENTFD", ffi.new("struct kvm_ioeventfd *", event))

    def irqfd(self, eventfd: int, gsi: int, *, deassign: bool = False) -> None:
        """Let an eventfd raise an interrupt line, without a thread in between."""
        flags = deassign and lib.KVM_IRQFD_FLAG_DEASSIGN
        call(self._fd, "KVM_IRQFD", ffi.new("struct kvm_irqfd *", (eventfd, gsi, flags)))

    def irq_line(self, gsi: int, level: bool) -> None:
        """Set an interrupt line's level."""
        call(self._fd, "KVM_IRQ_LINE", ffi.new("struct kvm_irq_level *", (gsi, level)))

    def signal_msi(self, address: int, data: int) -> bool:
        """Send an MSI message; ``False`` if the guest blocks it."""
        message = (address & 0xFFFF_FFFF, address >> 32, data, 0)
        return call(self._fd, "KVM_SIGNAL_MSI", ffi.new("struct kvm_msi *", message)) > 0

    def set_gsi_routing(self, routes: Iterable[MsiRoute]) -> None:
        """Replace the interrupt routing: pins of PIC and IOAPIC as at first, and these MSIs."""
        msis = list(routes)
        count = _PIC_PINS + _IOAPIC_PINS + len(msis)
        table = ffi.new("struct kvm_irq_routing *", {"nr": count, "entries": count})
        entries = table.entries
        for pin in range(_PIC_PINS):
            lib.route_pin(entries + pin, pin, IRQCHIPS[pin // 8], pin % 8)
        for pin in range(_IOAPIC_PINS):
            lib.route_pin(entries + _PIC_PINS + pin, pin, lib.KVM_IRQCHIP_IOAPIC, pin)
        for at, (gsi, address, data) in enumerate(msis, _PIC_PINS + _IOAPIC_PINS):
            lib.route_msi(entries + at, gsi, address, data)
        call(self._fd, "KVM_SET_GSI_ROUTING", table)

    def get_irqchip(self, chip: int) -> bytes:
        """Read one of :data:`IRQCHIPS`, as ``struct kvm_irqchip``."""
        state = ffi.new("struct kvm_irqchip *", {"chip_id": chip})
        call(self._fd, "KVM_GET_IRQCHIP", state)
        return bytes(ffi.buffer(state))

    def set_irqchip(self, state: bytes) -> None:
        """Load what :meth:`get_irqchip` gave. :raises ValueError: it has another size."""
        write(self._fd, "KVM_SET_IRQCHIP", state, IRQCHIP_SIZE)

    def get_pit(self) -> bytes:
        """Read the PIT, as ``struct kvm_pit_state2``."""
        return read(self._fd, "KVM_GET_PIT2", PIT_SIZE)

    def set_pit(self, state: bytes) -> None:
        """Load what :meth:`get_pit` gave. :raises ValueError: it has another size."""
        write(self._fd, "KVM_SET_PIT2", state, PIT_SIZE)

    def get_clock(self) -> int:
        """Read the guest's kvmclock, in nanoseconds."""
        data = ffi.new("struct kvm_clock_data *")
        call(self._fd, "KVM_GET_CLOCK", data)
        return int(data.clock)

    def set_clock(self, nanoseconds: int) -> None:
        """Let the guest's kvmclock go on from here."""
        call(self._fd, "KVM_SET_CLOCK", ffi.new("struct kvm_clock_data *", (nanoseconds, 0)))

    def create_vcpu(self, index: int) -> KvmVcpu:
        """Make a vCPU; its APIC id is its index until its CPUID says otherwise."""
        fd = call_value(self._fd, "KVM_CREATE_VCPU", index)
        try:
            vcpu = KvmVcpu(fd, index, self._run_size, self._xsave_size)
        except BaseException:
            os.close(fd)
            raise
        self._vcpus.append(vcpu)
        return vcpu
