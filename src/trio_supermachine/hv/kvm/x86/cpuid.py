"""CPUID of a guest's vCPUs, made from that which KVM supports. Without I/O.

The guest sees the host's processor, as far as KVM can virtualise it, with the topology of one
package of single-threaded cores, each with caches of its own but the last level. Features that the
machine does not have are taken away: performance counters, nested virtualisation, MWAIT, enclaves,
tracing.

Leaves are those of Intel's manual (volume 2A, CPUID), AMD's (volume 3, appendix E), and KVM's own
(Documentation/virt/kvm/x86/cpuid.rst).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import attrs

from ..ioctl import CpuidEntry

#: ``flags``: the entry is for its subleaf alone.
SIGNIFICANT_INDEX: Final = 1

_HYPERVISOR: Final = 0x40000000
_HYPERVISOR_FEATURES: Final = 0x40000001
_TIMING: Final = 0x40000010

#: Frequency of the local APIC's timer in KVM, in kHz.
_APIC_BUS_KHZ: Final = 1_000_000

# Leaves that are made here, and those that say "nothing of this kind" in all their registers:
# serial number, MWAIT, performance counters, enclaves, processor trace, key locker, last branch
# records; SVM, instruction-based sampling, lightweight profiling, memory encryption, counters,
# and a topology that would contradict the other leaves.
_MADE: Final = frozenset((0xB, 0x1F, _TIMING))
_ABSENT_BASIC: Final = frozenset((0x3, 0x5, 0xA, 0x12, 0x14, 0x19, 0x1C))
_ABSENT: Final = _ABSENT_BASIC | frozenset(
    (0x8000000A, 0x8000001B, 0x8000001C, 0x8000001F, 0x80000022, 0x80000026)
)

# Bits to take away, by leaf (and subleaf 0): (eax, ebx, ecx, edx).
_CLEARED: Final = {
    # DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, PDCM, TSC deadline, OSXSAVE; DS, thermal, TM
    0x1: (
        0,
        0,
        1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 15 | 1 << 24 | 1 << 27,
        1 << 21 | 1 << 22 | 1 << 28 | 1 << 29,
    ),
    # All of power management but ARAT, "the APIC timer always runs".
    0x6: (0xFFFFFFFF & ~(1 << 2), 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    # SGX, processor trace; key locker, SGX launch control
    0x7: (0, 1 << 2 | 1 << 25, 1 << 23 | 1 << 30, 0),
    # Asynchronous page faults: a page that KVM has promised to a guest and not yet delivered is in
    # no state that could be saved. A guest that waits for it would wait for ever after a restore.
    _HYPERVISOR_FEATURES: (1 << 4 | 1 << 10 | 1 << 14, 0, 0, 0),
    # SVM, extended APIC space, IBS, watchdog, SKINIT, lightweight profiling, counters, MONITORX
    0x80000001: (
        0,
        0,
        1 << 1 | 1 << 2 | 1 << 3 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 15
        | 1 << 23 | 1 << 24 | 1 << 28 | 1 << 29,
        0,
    ),
}  # fmt: skip

_TSC_DEADLINE: Final = 1 << 24
_HYPERVISOR_PRESENT: Final = 1 << 31
_HTT: Final = 1 << 28
_CMP_LEGACY: Final = 1 << 1

_LEVEL_THREAD: Final = 1
_LEVEL_CORE: Final = 2


def vcpu_cpuid(
    supported: Sequence[CpuidEntry],
    *,
    index: int,
    vcpus: int,
    tsc_deadline: bool,
    tsc_khz: int | None = None,
) -> tuple[CpuidEntry, ...]:
    """Make the leaves of one vCPU, for KVM_SET_CPUID2.

    :param supported: the leaves of KVM_GET_SUPPORTED_CPUID.
    :param index: the number of the vCPU, which is its APIC id, too.
    :param tsc_deadline: whether KVM has ``KVM_CAP_TSC_DEADLINE_TIMER``, which the supported leaves
        do not tell.
    :param tsc_khz: the guest's TSC frequency, for the timing leaf 0x40000010.
    """
    topology = _Topology(index=index, vcpus=vcpus)
    entries: dict[tuple[int, int], CpuidEntry] = {}
    for entry in supported:
        if entry.function not in _MADE and entry.function not in _ABSENT:
            changed = _change(entry, topology, tsc_deadline, timing=tsc_khz is not None)
            entries[entry.function, entry.index] = changed
    highest = entries[0, 0].eax if (0, 0) in entries else 0
    for function in (0xB, 0x1F):
        if function <= highest:
            for made in topology.leaves(function):
                entries[function, made.index] = made
    if tsc_khz is not None:
        entries[_TIMING, 0] = CpuidEntry(_TIMING, 0, 0, tsc_khz, _APIC_BUS_KHZ, 0, 0)
    return tuple(entries[key] for key in sorted(entries))


def address_bits(supported: Sequence[CpuidEntry]) -> int:
    """Give the width of a guest's physical addresses, in bits."""
    for entry in supported:
        if entry.function == 0x80000008:
            return entry.eax & 0xFF
    return 36


@attrs.frozen(kw_only=True)
class _Topology:
    """One package of cores with one thread each; a core's APIC id is its index."""

    index: int
    vcpus: int

    @property
    def bits(self) -> int:
        """Bits of an APIC id that tell the cores of the package apart."""
        return (self.vcpus - 1).bit_length()

    def leaves(self, function: int) -> Iterator[CpuidEntry]:
        """Give the leaves of the extended topology: threads, cores, and the end."""
        levels = (
            (0, 1, _LEVEL_THREAD),
            (self.bits, self.vcpus, _LEVEL_CORE),
            (0, 0, 0),
        )
        for subleaf, (shift, count, kind) in enumerate(levels):
            yield CpuidEntry(
                function, subleaf, SIGNIFICANT_INDEX, shift, count, kind << 8 | subleaf, self.index
            )

    def cache_sharing(self, level: int) -> int:
        """Give the number of APIC ids that share a cache of this level, less one."""
        return (1 << self.bits) - 1 if level >= 3 else 0


def _change(
    entry: CpuidEntry, topology: _Topology, tsc_deadline: bool, *, timing: bool
) -> CpuidEntry:
    eax, ebx, ecx, edx = entry.eax, entry.ebx, entry.ecx, entry.edx
    function = entry.function
    several = topology.vcpus > 1
    if function in _CLEARED and entry.index == 0:
        clear_eax, clear_ebx, clear_ecx, clear_edx = _CLEARED[function]
        eax, ebx, ecx, edx = eax & ~clear_eax, ebx & ~clear_ebx, ecx & ~clear_ecx, edx & ~clear_edx
    if function == 0x1:
        ebx = ebx & 0xFF00 | topology.index << 24 | 1 << topology.bits + 16
        ecx |= _HYPERVISOR_PRESENT | (_TSC_DEADLINE if tsc_deadline else 0)
        edx |= _HTT if several else 0
    elif function == 0x4 and eax & 0x1F:
        cores = (1 << topology.bits) - 1
        eax = eax & 0x3FFF | topology.cache_sharing(eax >> 5 & 7) << 14 | cores << 26
    elif function == _HYPERVISOR and timing:
        eax = max(eax, _TIMING)
    elif function == 0x80000001:
        ecx |= _CMP_LEGACY if several else 0
    elif function == 0x80000008:
        ecx = topology.vcpus - 1 | topology.bits << 12
    elif function == 0x8000001D and eax & 0x1F:
        eax = eax & 0x3FFF | topology.cache_sharing(eax >> 5 & 7) << 14
    elif function == 0x8000001E:
        eax, ebx, ecx, edx = topology.index, topology.index, 0, 0
    return attrs.evolve(entry, eax=eax, ebx=ebx, ecx=ecx, edx=edx)
