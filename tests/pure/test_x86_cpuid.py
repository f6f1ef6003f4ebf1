"""What a vCPU says of itself: the host's processor, alone in its machine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..support import tiny_guest

pytest.importorskip("trio_supermachine.hv.kvm._kvm", reason="built without the KVM binding")

from trio_supermachine.hv.kvm.ioctl import CpuidEntry
from trio_supermachine.hv.kvm.x86.cpuid import address_bits, vcpu_cpuid

ONES = 0xFFFFFFFF


def leaf(function: int, index: int = 0, *registers: int) -> CpuidEntry:
    eax, ebx, ecx, edx = registers or (ONES, ONES, ONES, ONES)
    return CpuidEntry(function, index, 0, eax, ebx, ecx, edx)


#: A host that has everything.
SUPPORTED = (
    leaf(0, 0, 0x1F, 0x756E6547, 0x6C65746E, 0x49656E69),
    *(leaf(function) for function in (0x1, 0x3, 0x5, 0x6, 0x7, 0xA, 0xB, 0x12, 0x14, 0x19, 0x1C)),
    leaf(0x4, 0, 1 << 5 | 1, 2, 3, 4),
    leaf(0x4, 1, 3 << 5 | 3, 2, 3, 4),
    leaf(0x4, 2, 0, 0, 0, 0),
    leaf(0x40000000, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
    leaf(0x40000001),
    leaf(0x80000000, 0, 0x80000026, 0, 0, 0),
    leaf(0x80000001),
    leaf(0x80000008, 0, 0x3028, 0, 0xFFFF, 0),
    leaf(0x8000000A),
    leaf(0x8000001D, 0, 3 << 5 | 3, 2, 3, 4),
    leaf(0x8000001E),
    leaf(0x8000001F),
    leaf(0x80000022),
    leaf(0x80000026),
)


def cpuid(
    index: int = 0, vcpus: int = 1, *, tsc_deadline: bool = True, tsc_khz: int | None = None
) -> dict[tuple[int, int], CpuidEntry]:
    entries = vcpu_cpuid(
        SUPPORTED, index=index, vcpus=vcpus, tsc_deadline=tsc_deadline, tsc_khz=tsc_khz
    )
    found = {(entry.function, entry.index): entry for entry in entries}
    assert len(found) == len(entries)
    return found


def test_there_is_a_hypervisor_and_no_other_below_it() -> None:
    entries = cpuid()
    one, seven, extended = entries[1, 0], entries[7, 0], entries[0x80000001, 0]
    assert one.ecx >> 31 & 1
    for bit in (3, 5, 6, 15):  # MONITOR, VMX, SMX, PDCM
        assert not one.ecx >> bit & 1
    assert not seven.ebx >> 2 & 1  # SGX
    assert not extended.ecx >> 2 & 1  # SVM
    assert not extended.ecx >> 29 & 1  # MONITORX
    for absent in (0x3, 0x5, 0xA, 0x12, 0x14, 0x19, 0x1C, 0x8000000A, 0x8000001F, 0x80000022):
        assert (absent, 0) not in entries


def test_what_kvm_offers_to_guests_stays_but_asynchronous_faults() -> None:
    entries = cpuid()
    assert entries[0x40000000, 0] == leaf(0x40000000, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D)
    assert entries[0x40000001, 0].eax == ONES & ~(1 << 4 | 1 << 10 | 1 << 14)


def test_the_tsc_deadline_is_told_apart() -> None:
    assert cpuid(tsc_deadline=True)[1, 0].ecx >> 24 & 1
    assert not cpuid(tsc_deadline=False)[1, 0].ecx >> 24 & 1


def test_the_timing_leaf_has_the_frequencies_of_tsc_and_apic_timer() -> None:
    entries = cpuid(tsc_khz=2_445_442)
    assert entries[0x40000000, 0].eax == 0x40000010
    assert entries[0x40000010, 0] == leaf(0x40000010, 0, 2_445_442, 1_000_000, 0, 0)


@settings(deadline=None)
@given(st.integers(1, 16))
def test_all_leaves_agree_on_one_package_of_single_threaded_cores(vcpus: int) -> None:
    width = (vcpus - 1).bit_length()
    seen = set()
    for index in range(vcpus):
        entries = cpuid(index, vcpus)
        one = entries[1, 0]
        assert one.ebx >> 24 == index
        assert vcpus <= one.ebx >> 16 & 0xFF == 1 << width
        for function in (0xB, 0x1F):
            thread, core, end = (entries[function, i] for i in range(3))
            assert (thread.eax, thread.ebx, thread.ecx >> 8) == (0, 1, 1)
            assert (core.eax, core.ebx, core.ecx >> 8) == (width, vcpus, 2)
            assert (end.eax, end.ebx, end.ecx >> 8) == (0, 0, 0)
            assert all(level.edx == index for level in (thread, core, end))
        own, shared = entries[4, 0].eax, entries[4, 1].eax
        assert (own >> 14 & 0xFFF, own >> 26) == (0, (1 << width) - 1)
        assert (shared >> 14 & 0xFFF, shared >> 26) == ((1 << width) - 1, (1 << width) - 1)
        assert entries[4, 2].eax == 0
        amd = entries[0x80000008, 0].ecx
        assert (amd & 0xFF, amd >> 12) == (vcpus - 1, width)
        assert entries[0x8000001D, 0].eax >> 14 & 0xFFF == (1 << width) - 1
        node = entries[0x8000001E, 0]
        assert (node.eax, node.ebx, node.ecx) == (index, index, 0)
        seen.add(tuple(entries.values()))
    assert len(seen) == vcpus


@settings(deadline=None)
@given(st.permutations(SUPPORTED))
def test_the_result_does_not_depend_on_the_order_of_leaves(supported: list[CpuidEntry]) -> None:
    def of(entries: tuple[CpuidEntry, ...] | list[CpuidEntry]) -> tuple[CpuidEntry, ...]:
        return vcpu_cpuid(entries, index=1, vcpus=3, tsc_deadline=True, tsc_khz=1)

    assert of(supported) == of(SUPPORTED)


def test_the_width_of_addresses_is_the_guests() -> None:
    assert address_bits(SUPPORTED) == 0x28
    assert address_bits(()) == 36


def test_kvm_takes_it() -> None:
    with tiny_guest.open_kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        supported = kvm.supported_cpuid()
        for index in range(2):
            vcpu = vm.create_vcpu(index)
            entries = vcpu_cpuid(supported, index=index, vcpus=2, tsc_deadline=True, tsc_khz=1000)
            vcpu.set_cpuid(entries)
            kept = {(entry.function, entry.index): entry for entry in vcpu.get_cpuid()}
            assert kept[1, 0].ebx >> 24 == index
