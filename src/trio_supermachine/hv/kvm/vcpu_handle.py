"""The ioctls of a vCPU, and the page that it shares with the kernel."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import Any, Final, final

from ._kvm import ffi, lib
from .ioctl import CpuidEntry, Descriptor, call, call_value, read, read_cpuid, write

#: KVM_GET_MSRS and KVM_SET_MSRS take fewer than 256 at a time.
_MSRS_AT_ONCE: Final = 128

#: Sizes of the parts of a vCPU's state that are one structure each, by the names of their ioctls.
VCPU_PARTS: Final = {
    "regs": ffi.sizeof("struct kvm_regs"),
    "sregs": ffi.sizeof("struct kvm_sregs"),
    "xcrs": ffi.sizeof("struct kvm_xcrs"),
    "lapic": ffi.sizeof("struct kvm_lapic_state"),
    "mp_state": ffi.sizeof("struct kvm_mp_state"),
    "vcpu_events": ffi.sizeof("struct kvm_vcpu_events"),
    "debugregs": ffi.sizeof("struct kvm_debugregs"),
}


@final
class KvmVcpu(Descriptor):
    """One virtual processor, and the page that it shares with the kernel.

    While one thread is in :meth:`enter`, all other calls but :meth:`close` wait for it to be back.
    No attribute may be used after :meth:`close`.

    :ivar run: the page, ``struct kvm_run``.
    :ivar io: its part for exits to a port.
    :ivar mmio: its part for exits to memory.
    :ivar shared: all of it as bytes.
    """

    def __init__(self, fd: int, index: int, run_size: int, xsave_size: int) -> None:
        super().__init__(fd)
        self.index = index
        self._run_size = run_size
        self._xsave_size = max(xsave_size, ffi.sizeof("struct kvm_xsave"))
        self._get_xsave = "KVM_GET_XSAVE2" if xsave_size else "KVM_GET_XSAVE"
        self.run: Any = lib.vcpu_map(fd, run_size)
        if self.run == ffi.NULL:
            raise OSError(errno.ENOMEM, "mmap of struct kvm_run: Cannot allocate memory")
        self.io: Any = lib.vcpu_io(self.run)
        self.mmio: Any = lib.vcpu_mmio(self.run)
        self.shared: memoryview = memoryview(ffi.buffer(self.run, run_size))

    def close(self) -> None:
        if self.run != ffi.NULL:
            self.shared.release()
            run, self.run = self.run, ffi.NULL
            self.io = self.mmio = ffi.NULL
            lib.vcpu_unmap(run, self._run_size)
        super().close()

    def enter(self) -> int:
        """Run the guest until its next exit (KVM_RUN), without the interpreter's lock.

        Give the exit's reason, or the negative ``errno``.
        """
        return lib.vcpu_run(self._fd, self.run)

    def get_regs(self) -> Any:
        """Read ``struct kvm_regs``, to change it and give it to :meth:`set_regs`."""
        regs = ffi.new("struct kvm_regs *")
        call(self._fd, "KVM_GET_REGS", regs)
        return regs

    def set_regs(self, regs: object) -> None:
        """Load what :meth:`get_regs` gave."""
        call(self._fd, "KVM_SET_REGS", regs)

    def get_sregs(self) -> Any:
        """Read ``struct kvm_sregs``, to change it and give it to :meth:`set_sregs`."""
        sregs = ffi.new("struct kvm_sregs *")
        call(self._fd, "KVM_GET_SREGS", sregs)
        return sregs

    def set_sregs(self, sregs: object) -> None:
        """Load what :meth:`get_sregs` gave."""
        call(self._fd, "KVM_SET_SREGS", sregs)

    def get_part(self, name: str) -> bytes:
        """Read one of :data:`VCPU_PARTS`, as the bytes of its structure."""
        return read(self._fd, f"KVM_GET_{name.upper()}", VCPU_PARTS[name])

    def set_part(self, name: str, state: bytes) -> None:
        """Load what :meth:`get_part` gave. :raises ValueError: it has another size."""
        write(self._fd, f"KVM_SET_{name.upper()}", state, VCPU_PARTS[name])

    def get_xsave(self) -> bytes:
        """Read the floating-point and vector state, in XSAVE's layout."""
        return read(self._fd, self._get_xsave, self._xsave_size)

    def set_xsave(self, state: bytes) -> None:
        """Load what :meth:`get_xsave` gave. :raises ValueError: this host has another size."""
        write(self._fd, "KVM_SET_XSAVE", state, self._xsave_size)

    def get_cpuid(self) -> list[CpuidEntry]:
        """Read the guest's CPUID, as the kernel has it now."""
        return read_cpuid(self._fd, "KVM_GET_CPUID2")

    def set_cpuid(self, entries: Iterable[CpuidEntry]) -> None:
        """Set the guest's CPUID, before the vCPU has run."""
        leaves = [(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries]
        table = {"nent": len(leaves), "entries": leaves}
        call(self._fd, "KVM_SET_CPUID2", ffi.new("struct kvm_cpuid2 *", table))

    def get_msrs(self, indices: Iterable[int]) -> tuple[dict[int, int], list[int]]:
        """Read MSRs; give their values, and the indices of those that KVM refuses to read."""
        values: dict[int, int] = {}
        refused: list[int] = []
        left = list(indices)
        while left:
            some = left[:_MSRS_AT_ONCE]
            msrs = _msr_table([(index, 0) for index in some])
            done = call(self._fd, "KVM_GET_MSRS", msrs)
            values.update((msrs.entries[i].index, msrs.entries[i].data) for i in range(done))
            refused += some[done : done + 1]
            left = left[done + 1 if done < len(some) else done :]
        return values, refused

    def set_msrs(self, values: Iterable[tuple[int, int]]) -> list[int]:
        """Write MSRs in this order; returns the indices of those that KVM refuses."""
        refused: list[int] = []
        left = list(values)
        while left:
            some = left[:_MSRS_AT_ONCE]
            done = call(self._fd, "KVM_SET_MSRS", _msr_table(some))
            refused += [index for index, _ in some[done : done + 1]]
            left = left[done + 1 if done < len(some) else done :]
        return refused

    def get_tsc_khz(self) -> int:
        """Read the frequency of the guest's TSC, in kHz."""
        return call_value(self._fd, "KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """Set another TSC frequency than the host's; needs KVM_CAP_TSC_CONTROL."""
        call_value(self._fd, "KVM_SET_TSC_KHZ", khz)

    def kvmclock_ctrl(self) -> bool:
        """Tell the guest that it stood still; ``False`` if it does not use kvmclock."""
        try:
            call_value(self._fd, "KVM_KVMCLOCK_CTRL")
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            return False
        return True


def _msr_table(values: Sequence[tuple[int, int]]) -> Any:
    entries = [{"index": index, "data": data} for index, data in values]
    return ffi.new("struct kvm_msrs *", {"nmsrs": len(entries), "entries": entries})
