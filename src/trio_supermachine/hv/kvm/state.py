"""The state of a machine's vCPUs and of its in-kernel devices: saved, and loaded in order.

All vCPUs must stand still (:meth:`.VcpuThread.pause`), and nothing may raise interrupts meanwhile.
A machine is loaded with :func:`restore_vcpus` first and :func:`restore_vm` second: pending
interrupts of the IOAPIC go to local APICs, and the clock is computed from the TSCs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from .api import IRQCHIPS, CpuidEntry, Kvm, KvmVcpu, KvmVm

_TSC: Final = 0x10
_TSC_DEADLINE: Final = 0x6E0

#: Parts per million that two TSC frequencies may differ and be the same: a host measures its own
#: at each boot, and NTP corrects more than that.
_TSC_TOLERANCE: Final = 250


@attrs.frozen(kw_only=True)
class VcpuState:
    """One vCPU. The parts are the kernel's structures, of their sizes on the host that saved them.

    :ivar msrs: (index, value), in KVM's order.
    :ivar unread: the MSRs of KVM's list that it refused to read.
    """

    cpuid: tuple[CpuidEntry, ...]
    tsc_khz: int
    msrs: tuple[tuple[int, int], ...]
    unread: tuple[int, ...]
    mp_state: bytes
    regs: bytes
    sregs: bytes
    xsave: bytes
    xcrs: bytes
    debugregs: bytes
    lapic: bytes
    vcpu_events: bytes


@attrs.frozen(kw_only=True)
class VmState:
    """The interrupt controllers (PICs and IOAPIC), the PIT, and kvmclock in nanoseconds."""

    irqchips: tuple[bytes, ...]
    pit: bytes
    clock: int


@attrs.frozen
class RefusedMsr:
    """A model-specific register that KVM would not set to what it was."""

    vcpu: int
    index: int
    value: int

    def __str__(self) -> str:
        return f"vCPU {self.vcpu}: MSR {self.index:#x} is not {self.value:#x} as it was"


def save_vcpus(kvm: Kvm, vcpus: Sequence[KvmVcpu]) -> tuple[VcpuState, ...]:
    """The state of a machine's vCPUs, whose machine has an in-kernel irqchip.

    :raises OSError: KVM refuses a part, which it then names.
    """
    indices = kvm.msr_indices()
    return _with_one_tsc([_save_vcpu(vcpu, indices) for vcpu in vcpus])


def _save_vcpu(vcpu: KvmVcpu, indices: Sequence[int]) -> VcpuState:
    # First, for asking for it makes KVM act on a pending INIT or SIPI, which changes the others.
    mp_state = vcpu.get_part("mp_state")
    # Before the local APIC: a deadline that passes in between is seen as pending there, or here,
    # or in both (then the guest gets one timer interrupt too many), but never in neither.
    msrs, unread = vcpu.get_msrs(indices)
    return VcpuState(
        cpuid=tuple(vcpu.get_cpuid()),
        tsc_khz=vcpu.get_tsc_khz(),
        msrs=tuple(msrs.items()),
        unread=tuple(unread),
        mp_state=mp_state,
        regs=vcpu.get_part("regs"),
        sregs=vcpu.get_part("sregs"),
        xsave=vcpu.get_xsave(),
        xcrs=vcpu.get_part("xcrs"),
        debugregs=vcpu.get_part("debugregs"),
        lapic=vcpu.get_part("lapic"),
        vcpu_events=vcpu.get_part("vcpu_events"),
    )


def _with_one_tsc(states: Sequence[VcpuState]) -> tuple[VcpuState, ...]:
    """As if all TSCs had been read at once, the time of the last."""
    latest = max((value for s in states for index, value in s.msrs if index == _TSC), default=0)
    return tuple(
        attrs.evolve(s, msrs=tuple((i, latest if i == _TSC else v) for i, v in s.msrs))
        for s in states
    )


def restore_vcpus(vcpus: Sequence[KvmVcpu], states: Sequence[VcpuState]) -> list[RefusedMsr]:
    """Load the state of all vCPUs of a machine, new ones or others that stand still.

    Returns the MSRs that have another value now, as KVM refused to set them. That is no failure by
    itself: the list of a newer kernel may have more of them.

    :raises ValueError: another number of vCPUs, or a part of another size than this host's.
    :raises OSError: KVM refuses a part, which it then names.
    """
    if len(vcpus) != len(states):
        raise ValueError(f"a state of {len(states)} vCPUs for a machine of {len(vcpus)}")
    pairs = list(zip(vcpus, states, strict=True))
    refused = [msr for vcpu, state in pairs for msr in _restore_vcpu(vcpu, state)]
    # Written close to each other, so that KVM takes them for one and keeps them synchronized.
    for vcpu, state in pairs:
        refused += _set_msrs(vcpu, [msr for msr in state.msrs if msr[0] == _TSC])
    for vcpu, state in pairs:
        # A deadline is one of the TSC, and arms a timer of the local APIC: it needs both.
        refused += _set_msrs(vcpu, [msr for msr in state.msrs if msr[0] == _TSC_DEADLINE])
        # Last, as other calls drop what is pending.
        vcpu.set_part("vcpu_events", state.vcpu_events)
        vcpu.kvmclock_ctrl()
    return refused


def _restore_vcpu(vcpu: KvmVcpu, state: VcpuState) -> list[RefusedMsr]:
    vcpu.set_cpuid(state.cpuid)
    here = vcpu.get_tsc_khz()
    if abs(here - state.tsc_khz) * 1_000_000 > here * _TSC_TOLERANCE:
        vcpu.set_tsc_khz(state.tsc_khz)
    vcpu.set_part("regs", state.regs)
    vcpu.set_part("xcrs", state.xcrs)  # what XSAVE may hold depends on it
    vcpu.set_xsave(state.xsave)
    vcpu.set_part("sregs", state.sregs)  # enables the local APIC and tells its mode
    vcpu.set_part("debugregs", state.debugregs)
    vcpu.set_part("lapic", state.lapic)
    vcpu.set_part("mp_state", state.mp_state)
    return _set_msrs(vcpu, [msr for msr in state.msrs if msr[0] not in (_TSC, _TSC_DEADLINE)])


def _set_msrs(vcpu: KvmVcpu, values: Sequence[tuple[int, int]]) -> list[RefusedMsr]:
    # What is as it should be is left alone: some that KVM lets one read it refuses to write, even
    # with the same value, or complains about in the kernel's log.
    present, _ = vcpu.get_msrs(index for index, _ in values)
    others = {index: value for index, value in values if present.get(index) != value}
    refused = vcpu.set_msrs(others.items())
    return [RefusedMsr(vcpu.index, index, others[index]) for index in refused]


def save_vm(vm: KvmVm) -> VmState:
    """The state of a machine's in-kernel devices.

    :raises OSError: KVM refuses a part, which it then names.
    """
    return VmState(
        irqchips=tuple(vm.get_irqchip(chip) for chip in IRQCHIPS),
        pit=vm.get_pit(),
        clock=vm.get_clock(),
    )


def restore_vm(vm: KvmVm, state: VmState) -> None:
    """Load the state of a machine's in-kernel devices, after its vCPUs.

    The guest's monotonic clock goes on from where it was, as if no time had passed.

    :raises ValueError: a part of another size.
    :raises OSError: KVM refuses a part, which it then names.
    """
    for chip in state.irqchips:
        vm.set_irqchip(chip)
    vm.set_pit(state.pit)
    vm.set_clock(state.clock)
