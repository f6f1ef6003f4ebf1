"""Compile ``_kvm``, the binding of the kernel's KVM interface, with the Zig compiler's C front end.

``python src/trio_supermachine/hv/kvm/_build.py`` makes ``_kvm.abi3.so`` beside this file; when it
is up to date it is left alone. cffi's API mode has the compiler check every structure and constant
below against ``linux/kvm.h``, which Zig brings along; ``Python.h`` is needed from the host.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

import cffi

# The oldest glibc that the binding runs with, and what a wheel with it is tagged for that.
_TARGET = "x86_64-linux-gnu.2.17"
_PLATFORM = "manylinux_2_17_x86_64"

_HERE = Path(__file__).resolve().parent
_FLAGS = (
    *("-shared", "-fPIC", "-O2", "-s", "-g0", "-std=gnu11", "-D_GNU_SOURCE"),
    *("-fno-ident", "-Wl,--build-id=none", "-Wno-unused-command-line-argument"),
)

_CDEF = """
#define KVM_GET_API_VERSION ...
#define KVM_CREATE_VM ...
#define KVM_GET_MSR_INDEX_LIST ...
#define KVM_CHECK_EXTENSION ...
#define KVM_GET_VCPU_MMAP_SIZE ...
#define KVM_GET_SUPPORTED_CPUID ...
#define KVM_CREATE_VCPU ...
#define KVM_GET_DIRTY_LOG ...
#define KVM_SET_USER_MEMORY_REGION ...
#define KVM_SET_TSS_ADDR ...
#define KVM_SET_IDENTITY_MAP_ADDR ...
#define KVM_CREATE_IRQCHIP ...
#define KVM_IRQ_LINE ...
#define KVM_GET_IRQCHIP ...
#define KVM_SET_IRQCHIP ...
#define KVM_SET_GSI_ROUTING ...
#define KVM_IRQFD ...
#define KVM_CREATE_PIT2 ...
#define KVM_IOEVENTFD ...
#define KVM_SIGNAL_MSI ...
#define KVM_GET_PIT2 ...
#define KVM_SET_PIT2 ...
#define KVM_GET_CLOCK ...
#define KVM_SET_CLOCK ...
#define KVM_RUN ...
#define KVM_GET_REGS ...
#define KVM_SET_REGS ...
#define KVM_GET_SREGS ...
#define KVM_SET_SREGS ...
#define KVM_GET_MSRS ...
#define KVM_SET_MSRS ...
#define KVM_GET_LAPIC ...
#define KVM_SET_LAPIC ...
#define KVM_GET_CPUID2 ...
#define KVM_SET_CPUID2 ...
#define KVM_GET_MP_STATE ...
#define KVM_SET_MP_STATE ...
#define KVM_GET_VCPU_EVENTS ...
#define KVM_SET_VCPU_EVENTS ...
#define KVM_GET_DEBUGREGS ...
#define KVM_SET_DEBUGREGS ...
#define KVM_GET_XSAVE ...
#define KVM_GET_XSAVE2 ...
#define KVM_SET_XSAVE ...
#define KVM_GET_XCRS ...
#define KVM_SET_XCRS ...
#define KVM_SET_TSC_KHZ ...
#define KVM_GET_TSC_KHZ ...
#define KVM_KVMCLOCK_CTRL ...

#define KVM_CAP_NR_VCPUS ...
#define KVM_CAP_MAX_VCPUS ...
#define KVM_CAP_NR_MEMSLOTS ...
#define KVM_CAP_TSC_CONTROL ...
#define KVM_CAP_TSC_DEADLINE_TIMER ...
#define KVM_CAP_KVMCLOCK_CTRL ...
#define KVM_CAP_X2APIC_API ...
#define KVM_CAP_IMMEDIATE_EXIT ...
#define KVM_CAP_IOEVENTFD_ANY_LENGTH ...
#define KVM_CAP_XSAVE2 ...

#define KVM_MEM_LOG_DIRTY_PAGES ...
#define KVM_MEM_READONLY ...
#define KVM_IRQCHIP_PIC_MASTER ...
#define KVM_IRQCHIP_PIC_SLAVE ...
#define KVM_IRQCHIP_IOAPIC ...
#define KVM_IRQFD_FLAG_DEASSIGN ...
#define KVM_IOEVENTFD_FLAG_DATAMATCH ...
#define KVM_IOEVENTFD_FLAG_PIO ...
#define KVM_IOEVENTFD_FLAG_DEASSIGN ...
#define KVM_PIT_SPEAKER_DUMMY ...
#define KVM_MP_STATE_RUNNABLE ...
#define KVM_VCPUEVENT_VALID_NMI_PENDING ...
#define KVM_VCPUEVENT_VALID_SIPI_VECTOR ...
#define KVM_VCPUEVENT_VALID_SHADOW ...
#define KVM_VCPUEVENT_VALID_SMM ...

#define KVM_EXIT_UNKNOWN ...
#define KVM_EXIT_IO ...
#define KVM_EXIT_HLT ...
#define KVM_EXIT_MMIO ...
#define KVM_EXIT_SHUTDOWN ...
#define KVM_EXIT_FAIL_ENTRY ...
#define KVM_EXIT_INTERNAL_ERROR ...
#define KVM_EXIT_SYSTEM_EVENT ...
#define KVM_EXIT_IO_OUT ...
#define KVM_SYSTEM_EVENT_SHUTDOWN ...
#define KVM_SYSTEM_EVENT_RESET ...
#define KVM_SYSTEM_EVENT_CRASH ...

struct kvm_userspace_memory_region {
    uint32_t slot, flags;
    uint64_t guest_phys_addr, memory_size, userspace_addr;
    ...;
};
struct kvm_dirty_log { uint32_t slot; void *dirty_bitmap; ...; };
struct kvm_pit_config { uint32_t flags; ...; };
struct kvm_pit_state2 { uint32_t flags; ...; };
struct kvm_irqchip { uint32_t chip_id; ...; };
struct kvm_clock_data { uint64_t clock; uint32_t flags; ...; };
struct kvm_irq_level { uint32_t irq; uint32_t level; ...; };
struct kvm_msi { uint32_t address_lo, address_hi, data, flags; ...; };
struct kvm_irqfd { uint32_t fd, gsi, flags; ...; };
struct kvm_ioeventfd {
    uint64_t datamatch, addr;
    uint32_t len;
    int32_t fd;
    uint32_t flags;
    ...;
};
struct kvm_irq_routing_entry { ...; };
struct kvm_irq_routing { uint32_t nr, flags; struct kvm_irq_routing_entry entries[]; ...; };
struct kvm_cpuid_entry2 {
    uint32_t function, index, flags, eax, ebx, ecx, edx;
    ...;
};
struct kvm_cpuid2 { uint32_t nent; struct kvm_cpuid_entry2 entries[]; ...; };
struct kvm_msr_list { uint32_t nmsrs; uint32_t indices[]; ...; };
struct kvm_msr_entry { uint32_t index; uint64_t data; ...; };
struct kvm_msrs { uint32_t nmsrs; struct kvm_msr_entry entries[]; ...; };

struct kvm_regs {
    uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags;
};
struct kvm_segment {
    uint64_t base;
    uint32_t limit;
    uint16_t selector;
    uint8_t type, present, dpl, db, s, l, g, avl, unusable;
    ...;
};
struct kvm_dtable { uint64_t base; uint16_t limit; ...; };
struct kvm_sregs {
    struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
    struct kvm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base;
    ...;
};
struct kvm_lapic_state { char regs[1024]; };
struct kvm_mp_state { uint32_t mp_state; ...; };
struct kvm_vcpu_events { uint32_t flags; ...; };
struct kvm_debugregs { uint64_t dr6, dr7; ...; };
struct kvm_xsave { ...; };
struct kvm_xcrs { uint32_t nr_xcrs; ...; };

struct vcpu_io {
    uint8_t direction, size;
    uint16_t port;
    uint32_t count;
    uint64_t data_offset;
    ...;
};
struct vcpu_mmio { uint64_t phys_addr; uint8_t data[8]; uint32_t len; uint8_t is_write; ...; };
struct vcpu_internal { uint32_t suberror, ndata; ...; };
struct vcpu_system_event { uint32_t type; ...; };
struct kvm_run {
    uint8_t immediate_exit;
    uint32_t exit_reason;
    ...;
};

long vcpu_run(int fd, struct kvm_run *run);
struct kvm_run *vcpu_map(int fd, size_t size);
void vcpu_unmap(struct kvm_run *run, size_t size);
struct vcpu_io *vcpu_io(struct kvm_run *run);
struct vcpu_mmio *vcpu_mmio(struct kvm_run *run);
struct vcpu_internal *vcpu_internal(struct kvm_run *run);
struct vcpu_system_event *vcpu_system_event(struct kvm_run *run);
uint64_t vcpu_entry_failure(struct kvm_run *run);

long kvm_pointer(int fd, unsigned long request, void *argument);
long kvm_value(int fd, unsigned long request, unsigned long argument);

void route_pin(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint32_t chip, uint32_t pin);
void route_msi(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint64_t address, uint32_t data);

int kick_install(void);
"""

_SOURCE = r"""
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <linux/kvm.h>

/* The members of struct kvm_run's union have no names of their own. */
struct vcpu_io { uint8_t direction, size; uint16_t port; uint32_t count; uint64_t data_offset; };
struct vcpu_mmio { uint64_t phys_addr; uint8_t data[8]; uint32_t len; uint8_t is_write; };
struct vcpu_internal { uint32_t suberror, ndata; };
struct vcpu_system_event { uint32_t type, ndata; };

#define SAME(mine, member, theirs) \
    _Static_assert(offsetof(struct mine, member) == \
        offsetof(struct kvm_run, theirs.member) - offsetof(struct kvm_run, theirs), #member)
SAME(vcpu_io, direction, io);
SAME(vcpu_io, size, io);
SAME(vcpu_io, port, io);
SAME(vcpu_io, count, io);
SAME(vcpu_io, data_offset, io);
SAME(vcpu_mmio, phys_addr, mmio);
SAME(vcpu_mmio, data, mmio);
SAME(vcpu_mmio, len, mmio);
SAME(vcpu_mmio, is_write, mmio);
SAME(vcpu_internal, suberror, internal);
SAME(vcpu_internal, ndata, internal);
SAME(vcpu_system_event, type, system_event);

static struct vcpu_io *vcpu_io(struct kvm_run *run) { return (void *)&run->io; }
static struct vcpu_mmio *vcpu_mmio(struct kvm_run *run) { return (void *)&run->mmio; }
static struct vcpu_internal *vcpu_internal(struct kvm_run *run) { return (void *)&run->internal; }
static struct vcpu_system_event *vcpu_system_event(struct kvm_run *run)
{
    return (void *)&run->system_event;
}
static uint64_t vcpu_entry_failure(struct kvm_run *run)
{
    return run->fail_entry.hardware_entry_failure_reason;
}

/* All calls give -errno on failure: nothing can come between a failure and its reason. */
static long result(long value) { return value < 0 ? -(long)errno : value; }

static long kvm_pointer(int fd, unsigned long request, void *argument)
{
    return result(ioctl(fd, request, argument));
}

static long kvm_value(int fd, unsigned long request, unsigned long argument)
{
    return result(ioctl(fd, request, argument));
}

/* The exit's reason, or -errno. */
static long vcpu_run(int fd, struct kvm_run *run)
{
    return ioctl(fd, KVM_RUN, 0) < 0 ? -(long)errno : (long)run->exit_reason;
}

static struct kvm_run *vcpu_map(int fd, size_t size)
{
    void *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return run == MAP_FAILED ? NULL : run;
}

static void vcpu_unmap(struct kvm_run *run, size_t size) { munmap(run, size); }

static void route_pin(
    struct kvm_irq_routing_entry *entry, uint32_t gsi, uint32_t chip, uint32_t pin)
{
    *entry = (struct kvm_irq_routing_entry){
        .gsi = gsi, .type = KVM_IRQ_ROUTING_IRQCHIP, .u.irqchip = {.irqchip = chip, .pin = pin}};
}

static void route_msi(
    struct kvm_irq_routing_entry *entry, uint32_t gsi, uint64_t address, uint32_t data)
{
    *entry = (struct kvm_irq_routing_entry){
        .gsi = gsi, .type = KVM_IRQ_ROUTING_MSI,
        .u.msi = {.address_lo = (uint32_t)address, .address_hi = address >> 32, .data = data}};
}

static void kicked(int number) { (void)number; }

/* Take the highest real-time signal that nobody uses and give it a handler that does nothing, so
 * that its only effect is to interrupt a system call. Returns its number, or -errno.
 * The caller sees to it that two threads are not in here at once. */
static int kick_install(void)
{
    static int chosen;
    for (int number = SIGRTMAX; !chosen && number >= SIGRTMIN; number--) {
        struct sigaction action = {.sa_handler = kicked}, present;
        if (sigaction(number, NULL, &present) < 0 || present.sa_handler != SIG_DFL)
            continue;
        if (sigaction(number, &action, NULL) < 0)
            return -errno;
        chosen = number;
    }
    return chosen ? chosen : -EBUSY;
}
"""


class CannotBuild(Exception):
    """This host or Python lacks what the binding needs; the message says what."""


def build() -> Path:
    """Compile the binding if it is out of date; returns its path.

    :raises CannotBuild: it makes no sense here, or Python's headers are missing.
    :raises subprocess.CalledProcessError: the compiler failed; it has said why on stderr.
    """
    headers = _python_headers()
    output = _HERE / f"_kvm{_suffix()}"
    stamp = _HERE / f".{output.name}.stamp"
    ffi = cffi.FFI()
    ffi.cdef(_CDEF)
    ffi.set_source("trio_supermachine.hv.kvm._kvm", _SOURCE)
    with tempfile.TemporaryDirectory(dir=_HERE, prefix=".build-") as directory:
        source = Path(directory, "_kvm.c")
        with contextlib.redirect_stdout(io.StringIO()):  # it says what it is doing
            ffi.emit_c_code(str(source))
        command = ["-target", _TARGET, *_FLAGS, *headers, source.name]
        words = [version("ziglang"), sys.version, *command, source.read_text()]
        state = hashlib.sha256("\0".join(words).encode()).hexdigest()
        if output.exists() and stamp.exists() and stamp.read_text() == state:
            return output
        fresh = Path(directory, output.name)
        subprocess.run(
            [sys.executable, "-m", "ziglang", "cc", *command, "-o", output.name],
            cwd=directory,
            check=True,
        )
        fresh.chmod(0o755)
        os.replace(fresh, output)
    stamp.write_text(state)
    return output


def wheel_tag() -> str:
    """Name the Pythons and platforms that a wheel with the binding is for."""
    this = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if _is_free_threaded():
        return f"{this}-{this}t-{_PLATFORM}"
    return f"cp311-abi3-{_PLATFORM}"


def _is_free_threaded() -> bool:
    # Such a Python has no stable ABI; each version needs a binding of its own.
    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def _suffix() -> str:
    return str(sysconfig.get_config_var("EXT_SUFFIX")) if _is_free_threaded() else ".abi3.so"


def _python_headers() -> list[str]:
    host = f"{sys.platform} {platform.machine()} {platform.libc_ver()[0]}".strip()
    if host != "linux x86_64 glibc":
        raise CannotBuild(f"KVM is bound on x86-64 Linux with glibc, and this is {host}")
    directory = Path(sysconfig.get_path("include"))
    if not (directory / "Python.h").exists():
        raise CannotBuild(
            f"there is no {directory}/Python.h: install Python's headers (Debian: python3-dev)"
        )
    # Debian's Python.h looks for its configuration below /usr/include.
    return ["-I", str(directory), "-idirafter", "/usr/include"]


if __name__ == "__main__":
    try:
        print(build())
    except CannotBuild as exc:
        sys.exit(str(exc))
