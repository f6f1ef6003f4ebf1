"""Guests of some instructions, in real, protected and long mode, straight on ``/dev/kvm``."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import attrs
import pytest

try:
    from trio_supermachine.hv.kvm import api
    from trio_supermachine.hv.kvm.vcpu import ExitHandlers, VcpuExit, VcpuThread
except ImportError:
    pytest.skip("the package was built without the KVM binding", allow_module_level=True)

__all__ = [
    "CODE",
    "DATA",
    "MEMORY",
    "ExitHandlers",
    "Mode",
    "Seen",
    "TinyGuest",
    "VcpuExit",
    "VcpuThread",
    "api",
    "code_out",
    "enter_mode",
    "halt_loop",
    "open_kvm",
    "out_loop",
    "spin",
    "tiny_guest",
]

Mode = Literal["real", "protected", "long"]

MEMORY = 0x20000
CODE = 0x4000
STACK = 0x9000
DATA = 0xA000
_PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000

_PE, _NE, _PG = 1, 0x20, 1 << 31
_OSFXSR_OSXMMEXCPT = 0x600
_PAE = 0x20
_LME_LMA = 0x500

spin = bytes.fromhex("eb fe")  # jmp here
halt_loop = bytes.fromhex("fb f4 eb fc")  # sti; hlt; again
out_loop = bytes.fromhex("ff c0 e6 10 eb fa")  # inc eax; out 0x10, al; again


def code_out(port: int) -> bytes:
    """Write ``al`` to a port."""
    return bytes([0xE6, port])


def open_kvm() -> api.Kvm:
    """``/dev/kvm``, or the test is skipped."""
    try:
        return api.Kvm.open()
    except OSError as exc:
        pytest.skip(f"/dev/kvm does not open: {exc}")


@attrs.frozen
class TinyGuest:
    kvm: api.Kvm
    vm: api.KvmVm
    vcpus: tuple[api.KvmVcpu, ...]
    memory: mmap.mmap

    @property
    def vcpu(self) -> api.KvmVcpu:
        return self.vcpus[0]


@contextmanager
def tiny_guest(
    code: bytes, mode: Mode = "long", *, irqchip: bool = False, vcpus: int = 1
) -> Iterator[TinyGuest]:
    """A machine of 128 KiB whose first vCPU is about to run ``code``, interrupts off."""
    with ExitStack() as stack:
        kvm = stack.enter_context(open_kvm())
        memory = stack.enter_context(mmap.mmap(-1, MEMORY, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))
        vm = stack.enter_context(kvm.create_vm())
        vm.set_tss_addr(0xFFFB_D000)
        if irqchip:
            vm.create_irqchip()
            vm.create_pit()
        vm.set_memory(0, 0, memory)
        made = tuple(vm.create_vcpu(index) for index in range(vcpus))
        for vcpu in made:
            vcpu.set_cpuid(_cpuid(kvm))
        load(memory, code)
        enter_mode(made[0], mode)
        yield TinyGuest(kvm, vm, made, memory)


def _cpuid(kvm: api.Kvm) -> list[api.CpuidEntry]:
    # KVM leaves it to its users to say that its local APIC has a TSC-deadline timer.
    has_timer = kvm.check_extension("KVM_CAP_TSC_DEADLINE_TIMER") > 0
    return [
        attrs.evolve(entry, ecx=entry.ecx | has_timer << 24) if entry.function == 1 else entry
        for entry in kvm.supported_cpuid()
    ]


def load(memory: mmap.mmap, code: bytes) -> None:
    """The code, and page tables that map the first GiB to itself."""
    memory[CODE : CODE + len(code)] = code
    present_writable, large_page = 3, 0x80
    struct.pack_into("<Q", memory, _PML4, _PDPT | present_writable)
    struct.pack_into("<Q", memory, _PDPT, _PD | present_writable)
    for entry in range(512):
        address = entry << 21
        struct.pack_into("<Q", memory, _PD + 8 * entry, address | large_page | present_writable)


def enter_mode(vcpu: api.KvmVcpu, mode: Mode) -> None:
    """Set the registers so that the vCPU is about to run at CODE, in supervisor mode."""
    sregs = vcpu.get_sregs()
    if mode == "real":
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
            segment.base = segment.selector = 0
    else:
        is_long = mode == "long"
        for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.cs):
            segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 0x10
            segment.type, segment.present, segment.s, segment.g = 3, 1, 1, 1
            segment.dpl, segment.db, segment.l, segment.unusable = 0, 1, 0, 0
        sregs.cs.selector, sregs.cs.type = 8, 11
        sregs.cs.db, sregs.cs.l = not is_long, is_long
        sregs.cr0 |= _PE | _NE
        sregs.cr4 |= _OSFXSR_OSXMMEXCPT
        if is_long:
            sregs.cr0 |= _PG
            sregs.cr4 |= _PAE
            sregs.cr3 = _PML4
            sregs.efer |= _LME_LMA
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp, regs.rflags = CODE, STACK, 2
    vcpu.set_regs(regs)


@attrs.define
class Seen:
    """What a guest did, in order: ``(what, where, size, value)``."""

    calls: list[tuple[str, int, int, int]] = attrs.field(factory=list)
    on_call: Callable[[], object] = lambda: None

    def stop_at(self, port: int, stop: Callable[[], None]) -> None:
        """Call ``stop`` when the guest reads or writes this port."""

        def check() -> None:
            if self.calls[-1][1] == port:
                stop()

        self.on_call = check

    def stop_after(self, count: int, stop: Callable[[], None]) -> None:
        """Call ``stop`` when the guest has done so much."""

        def check() -> None:
            if len(self.calls) >= count:
                stop()

        self.on_call = check

    def handlers(self) -> ExitHandlers:
        return ExitHandlers(
            port_in=lambda port, size: self._read("in", port, size),
            port_out=lambda port, size, value: self._write("out", port, size, value),
            mmio_read=lambda address, size: self._read("read", address, size),
            mmio_write=lambda address, size, value: self._write("write", address, size, value),
        )

    def _read(self, what: str, where: int, size: int) -> int:
        # More than fits: only the lowest bytes may reach the guest.
        value = 0xF1E2D3C4B5A69788 << 64 | 0x8877665544332211
        self._write(what, where, size, value & (1 << 8 * size) - 1)
        return value

    def _write(self, what: str, where: int, size: int, value: int) -> None:
        self.calls.append((what, where, size, value))
        self.on_call()
