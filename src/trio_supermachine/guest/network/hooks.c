#include "network/hooks.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bpf_hooks.h" /* made by build.py from bpf/hooks.c */

#define CGROUP "/sys/fs/cgroup"
#define JIT "/proc/sys/net/core/bpf_jit_enable"
#define LOG_SIZE 65536u
#define MAX_WORDS 1024u

struct hook {
    const char *name;
    const uint64_t *code;
    size_t words;
    enum bpf_attach_type at;
};

_Static_assert(sizeof to_flow6 <= MAX_WORDS * sizeof *to_flow6, "the longest of them");

#define HOOK(code, at) {#at, code, sizeof code / sizeof *code, BPF_CGROUP_##at}

/* All hooks. Those that lead out come last: the others must be there for the way back. */
/* clang-format off */
static const struct hook hooks[] = {
    HOOK(from_flow4, UDP4_RECVMSG),
    HOOK(from_flow4, INET4_GETPEERNAME),
    HOOK(own_address4, INET4_GETSOCKNAME),
    HOOK(from_flow6, UDP6_RECVMSG),
    HOOK(from_flow6, INET6_GETPEERNAME),
    HOOK(own_address6, INET6_GETSOCKNAME),
    HOOK(to_flow4, UDP4_SENDMSG),
    HOOK(to_flow6, UDP6_SENDMSG),
    HOOK(to_flow4, INET4_CONNECT),
    HOOK(to_flow6, INET6_CONNECT),
};
/* clang-format on */

static int destinations = -1;

static int bpf(enum bpf_cmd command, union bpf_attr *attributes) {
    return (int)syscall(SYS_bpf, command, attributes, sizeof *attributes);
}

static int make_map(void) {
    union bpf_attr attributes = {
        .map_type = BPF_MAP_TYPE_LRU_HASH,
        .key_size = sizeof(uint32_t),
        .value_size = sizeof(struct destination),
        .max_entries = MAX_DESTINATIONS,
        .map_name = "destinations",
    };
    return bpf(BPF_MAP_CREATE, &attributes);
}

/* Put the map's descriptor in the place of its address. */
static void refer_to_map(struct bpf_insn *code, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (code[i].code == (BPF_LD | BPF_IMM | BPF_DW) && code[i].src_reg == BPF_PSEUDO_MAP_FD)
            code[i].imm = destinations;
}

static int load(const struct hook *hook, char *log) {
    _Static_assert(sizeof(struct bpf_insn) == sizeof *hook->code, "an instruction is a word");
    struct bpf_insn code[MAX_WORDS];
    memcpy(code, hook->code, hook->words * sizeof *code);
    refer_to_map(code, hook->words);
    union bpf_attr attributes = {
        .prog_type = BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
        .expected_attach_type = hook->at,
        .insns = (uintptr_t)code,
        .insn_cnt = (uint32_t)hook->words,
        .license = (uintptr_t)"Apache-2.0",
        .log_level = log ? 1 : 0,
        .log_size = log ? LOG_SIZE : 0,
        .log_buf = (uintptr_t)log,
    };
    return bpf(BPF_PROG_LOAD, &attributes);
}

/* Load a hook once more, for what the kernel's verifier says of it. */
static void tell_why(const struct hook *hook) {
    char *log = must_alloc(LOG_SIZE);
    int fd = load(hook, log), error = errno;
    log[LOG_SIZE - 1] = 0;
    ssize_t ignored = write(2, log, strlen(log));
    (void)ignored;
    if (fd >= 0) close(fd);
    say("no connections to the outside: %s: %s", hook->name, strerror(error));
    free(log);
}

static bool attach(const struct hook *hook, int cgroup) {
    int program = load(hook, NULL);
    if (program < 0) {
        tell_why(hook);
        return false;
    }
    union bpf_attr attributes = {
        .target_fd = (uint32_t)cgroup,
        .attach_bpf_fd = (uint32_t)program,
        .attach_type = hook->at,
        .attach_flags = BPF_F_ALLOW_MULTI,
    };
    int failed = bpf(BPF_PROG_ATTACH, &attributes);
    if (failed) say("no connections to the outside: %s: %s", hook->name, strerror(errno));
    close(program); /* the cgroup holds it */
    return !failed;
}

static bool attach_all(int cgroup) {
    /* Have them interpreted. Compiled they would take 2 MiB in each snapshot, and they run once in
     * a connection. */
    char jit[16];
    long known = read_text(JIT, jit, sizeof jit);
    if (known > 0) write_text(JIT, "0"); /* a kernel that always compiles refuses that */
    bool attached = true;
    for (size_t i = 0; attached && i < sizeof hooks / sizeof *hooks; i++)
        attached = attach(&hooks[i], cgroup);
    if (known > 0) write_text(JIT, jit);
    return attached;
}

bool hooks_attach(void) {
    int cgroup = open(CGROUP, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    destinations = cgroup < 0 ? -1 : make_map();
    bool attached = destinations >= 0;
    if (!attached) say("no connections to the outside: cgroup-BPF: %s", strerror(errno));
    attached = attached && attach_all(cgroup);
    if (cgroup >= 0) close(cgroup);
    return attached;
}

bool destination_find(uint32_t id, struct destination *destination) {
    union bpf_attr attributes = {
        .map_fd = (uint32_t)destinations,
        .key = (uintptr_t)&id,
        .value = (uintptr_t)destination,
    };
    return destinations >= 0 && !bpf(BPF_MAP_LOOKUP_ELEM, &attributes);
}
