"""The KVM binding: what the ioctls do through it, how they fail, and what is let go of when."""

from __future__ import annotations

import errno
import mmap
import os
import runpy
import sysconfig
from pathlib import Path

import pytest
import trio

from ..support.tiny_guest import (
    CODE,
    DATA,
    MEMORY,
    Seen,
    VcpuThread,
    api,
    code_out,
    open_kvm,
    spin,
    tiny_guest,
)

pytestmark = pytest.mark.lab

_LAPIC_SPURIOUS = 0xF0


_BUILD = runpy.run_path(str(Path(api.__file__).with_name("_build.py")))


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _kvm_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("kvm-vcpu")


def test_without_pythons_headers_the_build_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(_BUILD["CannotBuild"], match=r"no .*/Python\.h: .*python3-dev"):
        _BUILD["build"]()


def test_a_device_that_is_not_kvm_is_refused_with_the_name_of_the_call(tmp_path: Path) -> None:
    before = _descriptors()
    with pytest.raises(OSError, match=r"KVM_GET_API_VERSION: Inappropriate ioctl") as caught:
        api.Kvm.open("/dev/null")
    assert caught.value.errno == errno.ENOTTY
    with pytest.raises(FileNotFoundError):
        api.Kvm.open(str(tmp_path / "kvm"))
    assert _descriptors() == before


def test_an_error_is_an_oserror_with_its_number_and_the_name_of_the_ioctl() -> None:
    with tiny_guest(spin, irqchip=True) as guest:
        with pytest.raises(FileExistsError, match=r"KVM_CREATE_IRQCHIP: File exists"):
            guest.vm.create_irqchip()
        with pytest.raises(FileExistsError, match=r"KVM_SET_USER_MEMORY_REGION"):
            guest.vm.set_memory(1, 0, guest.memory)
        with pytest.raises(OSError, match=r"KVM_IRQFD: Bad file descriptor"):
            guest.vm.irqfd(-1 & 0xFFFF_FFFF, 5)


def test_closing_a_machine_closes_its_vcpus_and_leaves_nothing_open_or_mapped() -> None:
    open_kvm().close()
    descriptors, mappings = _descriptors(), _kvm_mappings()
    with tiny_guest(spin, irqchip=True, vcpus=3) as guest:
        assert _kvm_mappings() == mappings + 3
    assert (_descriptors(), _kvm_mappings()) == (descriptors, mappings)
    guest.vm.close()
    guest.vcpu.close()


def test_what_is_closed_is_never_used_again_even_if_its_number_is_taken() -> None:
    with tiny_guest(spin) as guest:
        pass
    with open_kvm() as kvm, kvm.create_vm():
        with pytest.raises(OSError, match="Bad file descriptor"):
            guest.vm.get_clock()
        with pytest.raises(OSError, match="Bad file descriptor"):
            guest.vcpu.get_regs()
        assert guest.vcpu.enter() == -errno.EBADF
        with pytest.raises(ValueError, match="released"):
            guest.vcpu.shared[0]


def test_memory_cannot_be_unmapped_while_a_guest_can_reach_it() -> None:
    with open_kvm() as kvm:
        memory = mmap.mmap(-1, MEMORY)
        vm = kvm.create_vm()
        vm.set_memory(0, 0, memory)
        with pytest.raises(BufferError):
            memory.close()
        vm.remove_memory(0)
        vm.set_memory(1, 0, memory)
        with pytest.raises(BufferError):
            memory.close()
        vm.close()
        memory.close()


def test_memory_that_kvm_refuses_is_not_held() -> None:
    with open_kvm() as kvm, kvm.create_vm() as vm:
        memory = mmap.mmap(-1, MEMORY)
        with pytest.raises(OSError, match="Invalid argument"):
            vm.set_memory(0, 1, memory)  # unaligned
        memory.close()


def test_readonly_bytes_are_no_memory() -> None:
    with open_kvm() as kvm, kvm.create_vm() as vm, pytest.raises(BufferError):
        vm.set_memory(0, 0, memoryview(bytes(MEMORY)))


def test_state_of_another_size_is_refused_before_the_kernel_reads_beyond_it() -> None:
    with tiny_guest(spin, irqchip=True) as guest:
        for name in api.VCPU_PARTS:
            state = guest.vcpu.get_part(name)
            with pytest.raises(ValueError, match=f"KVM_SET_{name.upper()}"):
                guest.vcpu.set_part(name, state[:-1])
        with pytest.raises(ValueError, match="KVM_SET_XSAVE"):
            guest.vcpu.set_xsave(guest.vcpu.get_xsave() + b"\0")
        with pytest.raises(ValueError, match="KVM_SET_PIT2"):
            guest.vm.set_pit(b"")
        with pytest.raises(ValueError, match="KVM_SET_IRQCHIP"):
            guest.vm.set_irqchip(b"\0")


def test_registers_read_back_as_they_were_set() -> None:
    with tiny_guest(spin) as guest:
        regs = guest.vcpu.get_regs()
        regs.r15, regs.rip = 0x1122_3344_5566_7788, 0x1234
        guest.vcpu.set_regs(regs)
        assert guest.vcpu.get_regs().r15 == 0x1122_3344_5566_7788
        assert guest.vcpu.get_regs().rip == 0x1234
        with pytest.raises(OverflowError):
            regs.rip = 1 << 64


def test_cpuid_reads_back_as_it_was_set() -> None:
    with open_kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid([])
        assert vcpu.get_cpuid() == []
        vcpu.set_cpuid([api.CpuidEntry(0x4000_0000, 0, 0, 1, 2, 3, 4)])
        assert vcpu.get_cpuid() == [api.CpuidEntry(0x4000_0000, 0, 0, 1, 2, 3, 4)]


def test_an_msr_that_kvm_refuses_is_told_and_those_after_it_are_done() -> None:
    kernel_gs_base, no_such, star = 0xC000_0102, 0xDEAD_0000, 0xC000_0081
    with tiny_guest(spin) as guest:
        order = [kernel_gs_base, no_such, star, no_such + 1]
        refused = guest.vcpu.set_msrs([(index, 0x10_0000 + at) for at, index in enumerate(order)])
        assert refused == [no_such, no_such + 1]
        values, unread = guest.vcpu.get_msrs(order)
        assert values == {kernel_gs_base: 0x10_0000, star: 0x10_0002}
        assert unread == [no_such, no_such + 1]


def test_more_msrs_than_the_kernel_takes_at_once_are_all_done() -> None:
    star = 0xC000_0081
    with tiny_guest(spin) as guest:
        assert guest.vcpu.set_msrs([(star, value) for value in range(1000)]) == []
        assert guest.vcpu.get_msrs([star] * 999) == ({star: 999}, [])
        assert guest.vcpu.get_msrs([]) == ({}, [])


def test_the_dirty_log_has_the_pages_written_since_it_was_last_read() -> None:
    write = b"\xa2" + (DATA).to_bytes(8, "little")  # mov [DATA], al
    with tiny_guest(write + code_out(0x10) + spin) as guest:
        with pytest.raises(KeyError):
            guest.vm.dirty_log(5)
        guest.vm.set_memory(0, 0, guest.memory, log_dirty=True)
        while guest.vcpu.enter() == -errno.EINTR:
            pass
        log = int.from_bytes(guest.vm.dirty_log(0), "little")
        assert log >> (DATA >> 12) & 1
        assert not int.from_bytes(guest.vm.dirty_log(0), "little")


async def test_an_ioeventfd_takes_the_place_of_an_exit() -> None:
    out_any, out_match, end = 0x20, 0x30, 0x40
    code = b"\xb0\x05" + code_out(out_any)  # mov al, 5
    code += code_out(out_match) + b"\xb0\x07" + code_out(out_match)
    code += b"\xa2" + (0x1000_0000).to_bytes(8, "little")  # mov [0x10000000], al
    code += code_out(end) + spin
    seen = Seen()
    with tiny_guest(code) as guest:
        events = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3)]
        try:
            guest.vm.ioeventfd(events[0], out_any, length=1, port=True)
            guest.vm.ioeventfd(events[1], out_match, length=1, datamatch=7, port=True)
            guest.vm.ioeventfd(events[2], 0x1000_0000)
            thread = VcpuThread(guest.vcpu, seen.handlers())
            seen.stop_at(end, thread.stop)
            with trio.fail_after(60):
                await thread.run()
            assert seen.calls == [("out", out_match, 1, 5), ("out", end, 1, 7)]
            assert [os.eventfd_read(event) for event in events] == [1, 1, 1]
            guest.vm.ioeventfd(events[0], out_any, length=1, port=True, deassign=True)
            with pytest.raises(OSError, match="KVM_IOEVENTFD: No such file"):
                guest.vm.ioeventfd(events[0], out_any, length=1, port=True, deassign=True)
        finally:
            for event in events:
                os.close(event)


async def test_an_irqfd_wakes_a_halted_guest_with_the_routed_message() -> None:
    vector, gsi = 0x31, 24
    halt = bytes.fromhex("fb f4 eb fd")  # sti; hlt; jmp to the hlt
    handler = CODE + 0x100
    seen = Seen()
    with tiny_guest(halt, "real", irqchip=True) as guest:
        guest.memory[4 * vector : 4 * vector + 4] = handler.to_bytes(4, "little")
        guest.memory[handler : handler + 4] = code_out(0x55) + bytes.fromhex("cf eb")  # iret
        lapic = bytearray(guest.vcpu.get_part("lapic"))
        lapic[_LAPIC_SPURIOUS : _LAPIC_SPURIOUS + 4] = (0x1FF).to_bytes(4, "little")
        guest.vcpu.set_part("lapic", bytes(lapic))
        guest.vm.set_gsi_routing([api.MsiRoute(gsi, 0xFEE0_0000, vector)])
        event = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            guest.vm.irqfd(event, gsi)
            thread = VcpuThread(guest.vcpu, seen.handlers())
            seen.on_call = thread.stop
            async with trio.open_nursery() as nursery:
                nursery.start_soon(thread.run)
                with trio.fail_after(60):
                    await thread.pause()
                    thread.resume()
                os.eventfd_write(event, 1)
        finally:
            os.close(event)
        assert [call[:2] for call in seen.calls] == [("out", 0x55)]
