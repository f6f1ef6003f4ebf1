"""The probe of ``/dev/kvm``: whether it opens, and runs kernel code at the speed of the hardware.

Some hosts have a ``/dev/kvm`` that interprets supervisor code one instruction after the other: the
module ``kvm_pvm`` does so with ordinary guest kernels. Tiny guests work there, but Linux does not
get through its boot. So the probe runs a loop in 64-bit supervisor mode and times it.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import platform
import struct
import sys
import time
from typing import TYPE_CHECKING, Final

import attrs
import trio

if TYPE_CHECKING:
    from .api import Kvm, KvmVcpu

_DEVICE: Final = "/dev/kvm"

# One chunk is _ROUNDS times some privileged instructions and a loop of _LOOPS * 5 plain ones.
_ROUNDS: Final = 4
_LOOPS: Final = 1000
_CHUNK: Final = _ROUNDS * _LOOPS * 5
_CHUNKS: Final = 50

#: Instructions per second between emulation, which has some 10**6, and both hardware, with some
#: 10**9, and a translated KVM inside QEMU, with 5 * 10**7 at least.
_BOUND: Final = 5_000_000
#: Seconds of processor time that the chunks may take, and of wall time on a busy machine.
_CPU_LIMIT: Final = _CHUNK * _CHUNKS / _BOUND
_WALL_LIMIT: Final = 0.25

_MEMORY: Final = 0x10000
_EXIT_IO: Final = 2

_PE_NE_PG: Final = 0x8000_0021
_PAE: Final = 0x20
_LME_LMA: Final = 0x500

_PML4, _PDPT, _PD, _CODE, _STACK = 0x1000, 0x2000, 0x3000, 0x4000, 0x8000


@attrs.frozen(kw_only=True)
class KvmProbe:
    """Result of :func:`probe_kvm`.

    :ivar opens: whether this user may use the device.
    :ivar hardware_speed: whether it runs at the speed of hardware; ``None`` if that could not be
        measured.
    :ivar detail: what was found, for people.
    :ivar remedy: what may help, for people.
    :ivar instructions_per_second: the rate of the probe's guest in supervisor mode.
    """

    opens: bool
    hardware_speed: bool | None
    detail: str
    remedy: str | None = None
    instructions_per_second: float | None = None

    @property
    def usable(self) -> bool:
        """Whether Linux guests will run well."""
        return self.opens and self.hardware_speed is True


async def probe_kvm(device: str = _DEVICE) -> KvmProbe:
    """Probe ``device`` by a tiny guest in a worker thread, for 0.3 s at most.

    Nothing that is wrong with the host raises. A cancellation takes effect when the guest has
    ended; nothing is left open.
    """
    return await trio.to_thread.run_sync(_probe, device)


def _probe(device: str) -> KvmProbe:
    if sys.platform != "linux":
        return KvmProbe(opens=False, hardware_speed=None, detail="KVM is a part of Linux")
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return _unopened(device, exc)
    if platform.machine() != "x86_64":
        detail = f"{device} opens, but this version knows no {platform.machine()} machines"
        return KvmProbe(opens=True, hardware_speed=None, detail=detail)
    try:
        from . import api
    except ImportError as exc:
        return _unbound(device, exc)
    try:
        rate = _measure(api.Kvm.open(device))
    except (OSError, _Unfit) as exc:
        return KvmProbe(
            opens=True,
            hardware_speed=None,
            detail=f"{device} opens, but a tiny guest does not run on it: {exc}",
            remedy="look for other hypervisors in use, and in the kernel's log (dmesg)",
        )
    return _verdict(device, rate)


def _unbound(device: str, exc: ImportError) -> KvmProbe:
    return KvmProbe(
        opens=True,
        hardware_speed=None,
        detail=f"{device} opens, but this package was built without its KVM binding ({exc})",
        remedy=(
            "install Python's headers (Debian: sudo apt-get install python3-dev), then this package"
            " again: pip install --force-reinstall --no-deps trio-supermachine"
        ),
    )


def _unopened(device: str, exc: OSError) -> KvmProbe:
    if exc.errno in (errno.EACCES, errno.EPERM):
        reason = "this user may not open it"
        remedy = "join its group (sudo usermod -aG kvm $USER) and log in again"
    elif exc.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        reason = "there is no such device"
        remedy = (
            "load the module (sudo modprobe kvm_intel, or kvm_amd); if that fails, enable"
            " virtualization in the firmware or, in a cloud VM, nested virtualization"
        )
    else:
        reason, remedy = os.strerror(exc.errno or 0), "look in the kernel's log (dmesg)"
    return KvmProbe(opens=False, hardware_speed=None, detail=f"{device}: {reason}", remedy=remedy)


def _verdict(device: str, rate: float) -> KvmProbe:
    speed = f"{rate / 1e6:,.0f} million instructions a second"
    if rate >= _BOUND:
        return KvmProbe(
            opens=True,
            hardware_speed=True,
            detail=f"{device} runs supervisor code at hardware speed ({speed})",
            instructions_per_second=rate,
        )
    return KvmProbe(
        opens=True,
        hardware_speed=False,
        detail=(
            f"{device} opens, but it emulates supervisor code ({speed}, where hardware does"
            " about 1,000 million):"
            " a Linux guest would not get through its boot"
        ),
        remedy="use a host with hardware or nested virtualization; until then QEMU is the engine",
        instructions_per_second=rate,
    )


class _Unfit(Exception):
    """Device that answers, but not as KVM should."""


def _measure(kvm: Kvm) -> float:
    """Measure instructions per second of processor time, in 64-bit supervisor mode."""
    with kvm, mmap.mmap(-1, _MEMORY, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as memory:
        _load(memory)
        with kvm.create_vm() as vm:
            vm.set_memory(0, 0, memory)
            vcpu = vm.create_vcpu(0)
            # Newer kernels refuse long mode to a processor whose CPUID does not have it.
            vcpu.set_cpuid(kvm.supported_cpuid())
            _enter_long_mode(vcpu)
            return _time_chunks(vcpu)


def _enter_long_mode(vcpu: KvmVcpu) -> None:
    sregs = vcpu.get_sregs()
    for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 0x10
        segment.type, segment.present, segment.s, segment.g = 3, 1, 1, 1
        segment.dpl, segment.db, segment.l, segment.unusable = 0, 1, 0, 0
    sregs.cs.selector, sregs.cs.type, sregs.cs.db, sregs.cs.l = 8, 11, 0, 1
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _PE_NE_PG, _PML4, _PAE, _LME_LMA
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp, regs.rflags = _CODE, _STACK, 2
    vcpu.set_regs(regs)


def _time_chunks(vcpu: KvmVcpu) -> float:
    """Give the rate of the fastest chunk: below a busy hypervisor, others are slow."""
    fastest = math.inf
    start, wall_limit = time.thread_time(), time.monotonic() + _WALL_LIMIT
    before, chunks = start, 0
    while chunks < _CHUNKS and before - start < _CPU_LIMIT and time.monotonic() < wall_limit:
        reason = vcpu.enter()
        if reason == -errno.EINTR:  # a signal: the guest goes on where it was
            continue
        if reason != _EXIT_IO:
            raise _Unfit(f"the guest stopped with exit reason {reason}")
        now = time.thread_time()
        fastest = min(fastest, now - before)
        before, chunks = now, chunks + 1
    return _CHUNK / max(fastest, 1e-6)


def _load(memory: mmap.mmap) -> None:
    """Write page tables that map the first 2 MiB to itself, and the code."""
    present_writable, large_page = 3, 0x80
    entry = struct.Struct("<Q")
    entry.pack_into(memory, _PML4, _PDPT | present_writable)
    entry.pack_into(memory, _PDPT, _PD | present_writable)
    entry.pack_into(memory, _PD, large_page | present_writable)
    code = _guest_code()
    memory[_CODE : _CODE + len(code)] = code


def _guest_code() -> bytes:
    """Assemble an endless loop: a chunk of a booting kernel's work, then one port write."""
    loop = bytes.fromhex(
        "51"  # push rcx
        "58"  # pop rax
        "48 01 c3"  # add rbx, rax
        "ff c9"  # dec ecx
    )
    loop += b"\x75" + struct.pack("b", -(len(loop) + 2))  # jnz loop
    body = (
        bytes.fromhex(
            "0f 20 d8"  # mov rax, cr3
            "0f 22 d8"  # mov cr3, rax
            "0f 01 3c 24"  # invlpg [rsp]
            "0f 01 f8 0f 01 f8"  # swapgs, twice
            "b9 02 01 00 c0 31 c0 31 d2 0f 30"  # wrmsr KERNEL_GS_BASE, 0
            "9c fa 9d"  # pushfq; cli; popfq
            "b9"  # mov ecx, ...
        )
        + struct.pack("<I", _LOOPS)
        + loop
        + bytes.fromhex("ff ce")  # dec esi
    )
    chunk = b"\xbe" + struct.pack("<I", _ROUNDS)  # mov esi, ...
    chunk += body + b"\x0f\x85" + struct.pack("<i", -(len(body) + 6))  # jnz body
    chunk += bytes.fromhex("e6 10")  # out 0x10, al
    return chunk + b"\xe9" + struct.pack("<i", -(len(chunk) + 5))  # jmp chunk
