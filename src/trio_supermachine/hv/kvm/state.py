"""The state of a machine's vCPUs and of its in-kernel devices: saved, and loaded in order.

Theory of operation. All vCPUs stand still (:meth:`.VcpuThread.pause`), and nothing may raise
interrupts meanwhile. The order of the calls matters, as KVM derives one part from others.

*Saving* a vCPU begins with ``mp_state``: asking for it makes KVM act on a pending INIT or SIPI,
which changes the others. MSRs come before the local APIC: a TSC deadline that passes in between is
then seen as pending in one of them, or in both (the guest gets one timer interrupt too many), but
never in neither. All vCPUs get the TSC of the last one, as if they had been read at once.

*Loading* is, for each vCPU: CPUID, which decides what the rest may be; the TSC's frequency; general
registers; XCR0 before the XSAVE area that it describes; segment and control registers, which enable
the local APIC; the APIC; the other MSRs. Then for all vCPUs their TSCs, close to each other, so
that KVM takes them for one and keeps them synchronized. Then their deadlines, which need both the
TSC and the APIC, and events last, as other calls drop what is pending.

The machine's own devices (:func:`restore_vm`) follow: pending interrupts of the IOAPIC go to local
APICs, and the clock is computed from the TSCs.
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
    """State of one vCPU, in the kernel's structures, of the sizes that the saving host has.

    :ivar msrs: (index, value) of each MSR, in KVM's order.
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
    """State of the interrupt controllers (PICs and IOAPIC), the PIT, and kvmclock in ns."""

    irqchips: tuple[bytes, ...]
    pit: bytes
    clock: int


@attrs.frozen
class RefusedMsr:
    """Model-specific register that KVM has refused to set."""

    vcpu: int
    index: int
    value: int

    def __str__(self) -> str:
        return f"vCPU {self.vcpu}: MSR {self.index:#x} is not {self.value:#x} as it was"


def save_vcpus(kvm: Kvm, vcpus: Sequence[KvmVcpu]) -> tuple[VcpuState, ...]:
    """Save the vCPUs of a machine that has an in-kernel irqchip.

    :raises OSError: KVM refuses a part, which it then names.
    """
    indices = kvm.msr_indices()
    return _with_one_tsc([_save_vcpu(vcpu, indices) for vcpu in vcpus])


def _save_vcpu(vcpu: KvmVcpu, indices: Sequence[int]) -> VcpuState:
    mp_state = vcpu.get_part("mp_state")
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
    """Give all vCPUs the latest of their TSCs."""
    latest = max((value for s in states for index, value in s.msrs if index == _TSC), default=0)
    return tuple(
        attrs.evolve(s, msrs=tuple((i, latest if i == _TSC else v) for i, v in s.msrs))
        for s in states
    )


def restore_vcpus(vcpus: Sequence[KvmVcpu], states: Sequence[VcpuState]) -> list[RefusedMsr]:
    """Load the state of all vCPUs of a machine, new ones or others that stand still.

    Give the MSRs that KVM refused to set. That is no failure by itself: the list of a newer kernel
    may have more of them.

    :raises ValueError: another number of vCPUs, or a part of another size than this host's.
    :raises OSError: KVM refuses a part, which it then names.
    """
    if len(vcpus) != len(states):
        raise ValueError(f"a state of {len(states)} vCPUs for a machine of {len(vcpus)}")
    pairs = list(zip(vcpus, states, strict=True))
    refused = [msr for vcpu, state in pairs for msr in _restore_vcpu(vcpu, state)]
    for vcpu, state in pairs:
        refused += _set_msrs(vcpu, [msr for msr in state.msrs if msr[0] == _TSC])
    for vcpu, state in pairs:
        refused += _set_msrs(vcpu, [msr for msr in state.msrs if msr[0] == _TSC_DEADLINE])
        vcpu.set_part("vcpu_events", state.vcpu_events)
        vcpu.kvmclock_ctrl()
    return refused


def _restore_vcpu(vcpu: KvmVcpu, state: VcpuState) -> list[RefusedMsr]:
    vcpu.set_cpuid(state.cpuid)
    here = vcpu.get_tsc_khz()
    if abs(here - state.tsc_khz) * 1_000_000 > here * _TSC_TOLERANCE:
        vcpu.set_tsc_khz(state.tsc_khz)
    vcpu.set_part("regs", state.regs)
    vcpu.set_part("xcrs", state.xcrs)
    vcpu.set_xsave(state.xsave)
    vcpu.set_part("sregs", state.sregs)
    vcpu.set_part("debugregs", state.debugregs)
    vcpu.set_part("lapic", state.lapic)
    vcpu.set_part("mp_state", state.mp_state)
    return _set_msrs(vcpu, [msr for msr in state.msrs if msr[0] not in (_TSC, _TSC_DEADLINE)])


def _set_msrs(vcpu: KvmVcpu, values: Sequence[tuple[int, int]]) -> list[RefusedMsr]:
    # MSRs that have their value are left alone: some that KVM reads it refuses to write, even with
    # the same value, or complains about in the kernel's log.
    present, _ = vcpu.get_msrs(index for index, _ in values)
    others = {index: value for index, value in values if present.get(index) != value}
    refused = vcpu.set_msrs(others.items())
    return [RefusedMsr(vcpu.index, index, others[index]) for index in refused]


def save_vm(vm: KvmVm) -> VmState:
    """Save a machine's in-kernel devices.

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
