"""A machine's state moves to another one, and the guest goes on there as if nothing happened."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine.hv.kvm.state import (
    RefusedMsr,
    VcpuState,
    VmState,
    restore_vcpus,
    restore_vm,
    save_vcpus,
    save_vm,
)

from ..support.tiny_guest import (
    CODE,
    DATA,
    Seen,
    TinyGuest,
    VcpuThread,
    api,
    code_out,
    enter_mode,
    halt_loop,
    spin,
    tiny_guest,
)

from trio_supermachine.hv.kvm.state_format import decode_state, encode_state  # isort: skip

pytestmark = pytest.mark.lab

KERNEL_GS_BASE = 0xC000_0102
TSC, TSC_DEADLINE = 0x10, 0x6E0
NO_SUCH_MSR = 0xDEAD_0000
LAPIC_SPURIOUS = 0xF0

AT_DATA = struct.pack("<I", DATA)
# Counts in r15 and tells it, a vector register that holds the last count, and an MSR set before.
# (What emulates supervisor code knows few vector instructions: loads and stores.)
COUNTING = bytes.fromhex("b9 020100c0 b8 5a000000 31d2 0f30 4531ff")  # KERNEL_GS_BASE = 0x5a
COUNTING_LOOP = (
    *(bytes.fromhex("0f110425") + AT_DATA, bytes.fromhex("8a0425") + AT_DATA),  # al = xmm0
    code_out(0x11),
    bytes.fromhex("49ffc7"),  # inc r15
    *(bytes.fromhex("4c893c25") + AT_DATA, bytes.fromhex("0f100425") + AT_DATA),  # xmm0 = r15
    bytes.fromhex("4488f8"),  # mov al, r15b
    code_out(0x10),
    bytes.fromhex("0f32"),  # rdmsr
    code_out(0x12),
)
COUNTING += b"".join(COUNTING_LOOP)
COUNTING += b"\xeb" + struct.pack("b", -(sum(map(len, COUNTING_LOOP)) + 2))


def _save(guest: TinyGuest) -> bytes:
    return encode_state(save_vcpus(guest.kvm, guest.vcpus), save_vm(guest.vm))


def _restore(guest: TinyGuest, state: bytes) -> list[RefusedMsr]:
    vcpus, vm = decode_state(state)
    refused = restore_vcpus(guest.vcpus, vcpus)
    restore_vm(guest.vm, vm)
    return refused


@contextmanager
def _copy(guest: TinyGuest, state: bytes) -> Iterator[TinyGuest]:
    """Another machine with the same memory and the saved state."""
    with tiny_guest(b"", irqchip=True, vcpus=len(guest.vcpus)) as other:
        other.memory[:] = guest.memory[:]
        assert _restore(other, state) == []
        yield other


async def _run_until(guest: TinyGuest, seen: Seen, count: int) -> None:
    thread = VcpuThread(guest.vcpu, seen.handlers())
    seen.stop_after(count, thread.stop)
    with trio.fail_after(60):
        assert (await thread.run()).end == "stopped"


async def test_a_guest_goes_on_in_another_machine_with_the_same_registers() -> None:
    seen = Seen()
    with tiny_guest(COUNTING, irqchip=True) as first:
        await _run_until(first, seen, 100)
        state = _save(first)
        with _copy(first, state) as second:
            assert second.vcpu.get_part("regs") == first.vcpu.get_part("regs")
            assert second.vcpu.get_xsave() == first.vcpu.get_xsave()
            await _run_until(second, seen, 200)
            with _copy(second, _save(second)) as third:
                await _run_until(third, seen, 300)
        # The first goes on too, from where it was saved.
        again = Seen(calls=seen.calls[:100])
        await _run_until(first, again, 200)
    counts = [(value, port) for _, port, _, value in seen.calls]
    expected = [[(n - 1, 0x11), (n, 0x10), (0x5A, 0x12)] for n in range(1, 101)]
    assert counts == [access for three in expected for access in three]
    assert again.calls == seen.calls[:200]


async def test_it_goes_on_when_it_was_stopped_between_any_two_instructions() -> None:
    with tiny_guest(COUNTING, irqchip=True) as guest:
        thread = VcpuThread(guest.vcpu, Seen().handlers())
        state = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(thread.run)
            for _ in range(20):
                await thread.pause()
                state = _save(guest)
                thread.resume()
            await thread.pause()
            nursery.cancel_scope.cancel()
        r15 = int(struct.unpack_from("<Q", decode_state(state)[0][0].regs, 8 * 15)[0])
        with _copy(guest, state) as other:
            seen = Seen()
            await _run_until(other, seen, 30)
    told = [value for _, port, _, value in seen.calls if port == 0x10]
    assert told[0] - r15 & 0xFF in (0, 1)
    assert told == [told[0] + n & 0xFF for n in range(len(told))]


async def test_a_halted_guest_is_woken_in_the_machine_it_was_moved_to() -> None:
    vector, handler = 0x31, CODE + 0x100
    seen = Seen()
    with tiny_guest(halt_loop, "real", irqchip=True) as first:
        first.memory[4 * vector : 4 * vector + 4] = handler.to_bytes(4, "little")
        first.memory[handler : handler + 3] = code_out(0x55) + b"\xcf"  # iret
        lapic = bytearray(first.vcpu.get_part("lapic"))
        lapic[LAPIC_SPURIOUS : LAPIC_SPURIOUS + 4] = (0x1FF).to_bytes(4, "little")
        first.vcpu.set_part("lapic", bytes(lapic))
        thread = VcpuThread(first.vcpu, seen.handlers())
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(thread.run)
                await thread.pause()
                while first.vcpu.get_regs().rip != CODE + 2:  # behind the hlt
                    thread.resume()
                    await trio.sleep(0.001)  # paused at once, it would never get to run
                    await thread.pause()
                state = _save(first)
                nursery.cancel_scope.cancel()
        with _copy(first, state) as second:
            second.vm.signal_msi(0xFEE0_0000, vector)  # before it runs: it is pending
            with _copy(second, _save(second)) as third:
                await _run_until(third, seen, 1)
    assert [call[:2] for call in seen.calls] == [("out", 0x55)]


def test_saving_what_was_restored_gives_the_same_state() -> None:
    with tiny_guest(spin, irqchip=True, vcpus=3) as first:
        enter_mode(first.vcpus[1], "protected")
        first.vcpus[2].set_msrs([(KERNEL_GS_BASE, 0x1234_5678)])
        saved = decode_state(_save(first))
        with _copy(first, encode_state(*saved)) as second:
            again = decode_state(_save(second))
    moving = set(_moving_msrs(saved[0][0].msrs))
    for was, now in zip(saved[0], again[0], strict=True):
        assert _still(now, moving) == _still(was, moving)
    assert again[1].irqchips == saved[1].irqchips
    assert again[1].clock >= saved[1].clock


def _moving_msrs(msrs: tuple[tuple[int, int], ...]) -> list[int]:
    # The TSC, and Hyper-V's run time and reference time, which go on.
    return [index for index, _ in msrs if index in (TSC, 0x4000_0010, 0x4000_0020)]


def _still(state: VcpuState, moving: set[int]) -> VcpuState:
    return attrs.evolve(state, msrs=tuple(msr for msr in state.msrs if msr[0] not in moving))


def test_all_vcpus_are_saved_with_one_time_stamp() -> None:
    with tiny_guest(spin, irqchip=True, vcpus=4) as guest:
        stamps = {dict(state.msrs)[TSC] for state in save_vcpus(guest.kvm, guest.vcpus)}
    assert len(stamps) == 1


def test_a_timer_that_was_armed_is_armed_again() -> None:
    later = 1 << 60
    with tiny_guest(spin, irqchip=True) as first:
        lapic = bytearray(first.vcpu.get_part("lapic"))
        lapic[LAPIC_SPURIOUS : LAPIC_SPURIOUS + 4] = (0x1FF).to_bytes(4, "little")
        lapic[0x320:0x324] = (0x400EC).to_bytes(4, "little")  # the timer, in TSC-deadline mode
        first.vcpu.set_part("lapic", bytes(lapic))
        first.vcpu.set_msrs([(TSC_DEADLINE, later)])
        if first.vcpu.get_msrs([TSC_DEADLINE])[0].get(TSC_DEADLINE) != later:
            pytest.skip("no TSC-deadline timer here")
        with _copy(first, _save(first)) as second:
            assert second.vcpu.get_msrs([TSC_DEADLINE])[0] == {TSC_DEADLINE: later}
            assert second.vcpu.get_part("lapic")[0x320:0x324] == lapic[0x320:0x324]


def test_a_refused_msr_is_told_by_number_and_keeps_no_other_from_being_set() -> None:
    with tiny_guest(spin, irqchip=True) as guest:
        (state,) = save_vcpus(guest.kvm, guest.vcpus)
        others = tuple(msr for msr in state.msrs if msr[0] != KERNEL_GS_BASE)
        msrs = ((NO_SUCH_MSR, 7), *others, (KERNEL_GS_BASE, 0x77_0000))
        refused = restore_vcpus(guest.vcpus, [attrs.evolve(state, msrs=msrs)])
        assert refused == [RefusedMsr(0, NO_SUCH_MSR, 7)]
        assert "vCPU 0: MSR 0xdead0000 is not 0x7" in str(refused[0])
        assert guest.vcpu.get_msrs([KERNEL_GS_BASE])[0] == {KERNEL_GS_BASE: 0x77_0000}


def test_the_clock_goes_on_from_where_it_was() -> None:
    day = 86_400 * 10**9
    with tiny_guest(spin, irqchip=True) as guest:
        state = attrs.evolve(save_vm(guest.vm), clock=day)
        restore_vm(guest.vm, state)
        assert day <= guest.vm.get_clock() < 2 * day


def test_the_state_of_another_host_or_machine_is_refused() -> None:
    with tiny_guest(spin, irqchip=True, vcpus=2) as guest:
        states = save_vcpus(guest.kvm, guest.vcpus)
        with pytest.raises(ValueError, match="2 vCPUs for a machine of 1"):
            restore_vcpus(guest.vcpus[:1], states)
        longer = attrs.evolve(states[0], xsave=states[0].xsave + bytes(64))
        with pytest.raises(ValueError, match="KVM_SET_XSAVE"):
            restore_vcpus(guest.vcpus, [longer, states[1]])


u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)


@st.composite
def vcpu_states(draw: st.DrawFn) -> VcpuState:
    # What the bytes are does not matter here; that they come back in their places does.
    fill = draw(st.integers(0, 240))
    parts = {name: bytes([fill + at]) * size for at, (name, size) in enumerate(_PARTS)}
    cpuid = draw(st.lists(st.builds(api.CpuidEntry, *[u32] * 7), max_size=3))
    return VcpuState(
        cpuid=tuple(cpuid),
        tsc_khz=draw(u32),
        msrs=tuple(draw(st.lists(st.tuples(u32, u64), max_size=3))),
        unread=tuple(draw(st.lists(u32, max_size=3))),
        xsave=bytes(draw(st.sampled_from([4096, 11008]))),
        **parts,
    )


_PARTS = tuple(api.VCPU_PARTS.items())
vm_states = st.builds(
    VmState,
    irqchips=st.just(tuple(bytes([n]) * api.IRQCHIP_SIZE for n in range(3))),
    pit=st.just(b"p" * api.PIT_SIZE),
    clock=u64,
)
machine_states = st.tuples(st.lists(vcpu_states(), min_size=1, max_size=3).map(tuple), vm_states)


@given(machine_states)
@settings(deadline=None, max_examples=30)
def test_a_state_comes_back_from_its_bytes(machine: tuple[tuple[VcpuState, ...], VmState]) -> None:
    assert decode_state(encode_state(*machine)) == machine


@given(machine_states, st.data())
@settings(deadline=None, max_examples=30)
def test_damaged_bytes_are_a_value_error_or_another_state(
    machine: tuple[tuple[VcpuState, ...], VmState], data: st.DataObject
) -> None:
    whole = encode_state(*machine)
    with pytest.raises(ValueError, match="KVM state"):
        decode_state(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="1 bytes too many"):
        decode_state(whole + b"\0")
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    with suppress(ValueError):
        assert decode_state(damaged) != machine


@given(st.binary(max_size=300))
def test_any_bytes_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="KVM state"):
        decode_state(data)
    with pytest.raises(ValueError, match="KVM state"):
        decode_state(b"TSM-KVM\0\1\0\1\0" + data)


def test_a_state_of_another_version_is_named() -> None:
    with pytest.raises(ValueError, match="version 2, and this is for version 1"):
        decode_state(b"TSM-KVM\0\2\0\1\0")


def test_the_count_of_msrs_is_bounded() -> None:
    with tiny_guest(spin, irqchip=True) as guest:
        (state,) = save_vcpus(guest.kvm, guest.vcpus)
        many = attrs.evolve(state, msrs=tuple((n, 0) for n in range(5000)))
        with pytest.raises(ValueError, match="msrs of 60000 bytes"):
            decode_state(encode_state([many], save_vm(guest.vm)))
