#include "programs/intocgroup.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>

/* Moving a process to a cgroup waits for every processor; being born in one costs nothing. Only
 * clone3 can do that. libc has no function for it, and C cannot return on two stacks: so the child
 * calls its function, and never returns from it, in assembler. */

#define INTO_CGROUP 0x200000000ull

struct clone_args {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
        set_tid_size, cgroup;
};

pid_t clone_into_cgroup(int cgroup, int (*function)(void *), void *stack, size_t stack_size,
                        void *argument) {
    struct clone_args arguments = {
        .flags = INTO_CGROUP | CLONE_VM | CLONE_VFORK,
        .exit_signal = SIGCHLD,
        .stack = (uint64_t)(uintptr_t)stack,
        .stack_size = stack_size,
        .cgroup = (uint64_t)cgroup,
    };
    /* clang-format off */
#if defined __x86_64__
    register int (*child)(void *) __asm__("r8") = function;
    register void *handed __asm__("r9") = argument;
    long result = SYS_clone3;
    __asm__ volatile(
        "syscall\n\t"
        "test %%rax, %%rax\n\t"
        "jnz 1f\n\t"
        "xor %%ebp, %%ebp\n\t"
        "mov %%r9, %%rdi\n\t"
        "call *%%r8\n\t"
        "hlt\n"
        "1:"
        : "+a"(result)
        : "D"(&arguments), "S"(sizeof arguments), "r"(child), "r"(handed)
        : "rcx", "r11", "memory", "cc");
#elif defined __aarch64__
    register long number __asm__("x8") = SYS_clone3;
    register long result __asm__("x0") = (long)&arguments;
    register long size __asm__("x1") = sizeof arguments;
    register int (*child)(void *) __asm__("x2") = function;
    register void *handed __asm__("x3") = argument;
    __asm__ volatile(
        "svc 0\n\t"
        "cbnz x0, 1f\n\t"
        "mov x29, xzr\n\t"
        "mov x0, x3\n\t"
        "blr x2\n\t"
        "brk 1\n"
        "1:"
        : "+r"(result)
        : "r"(number), "r"(size), "r"(child), "r"(handed)
        : "memory", "cc");
#else
#error "clone3 has to be written for this processor"
#endif
    /* clang-format on */
    if (result >= 0) return (pid_t)result;
    errno = (int)-result;
    return -1;
}
