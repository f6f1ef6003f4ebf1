#include "programs/program.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "programs/freezer.h"
#include "programs/intocgroup.h"

/* The child runs in this process's memory until it executes, while this process stands still
 * (CLONE_VM and CLONE_VFORK). So nothing is copied, and the child leaves its error in `struct
 * start`. It must call nothing that keeps state. libc's set*id functions would try to reach other
 * threads, so the system calls are made directly. */

struct start {
    const struct program *program;
    const char *path; /* to look in for argv[0]; NULL: that is a path itself */
    int error;
    const char *failed;
};

static struct rlimit files_limit;
static char stack[65536] __attribute__((aligned(16)));
static char candidate[PATH_MAX];

void spawn_init(void) {
    getrlimit(RLIMIT_NOFILE, &files_limit);
    struct rlimit all = {files_limit.rlim_max, files_limit.rlim_max};
    setrlimit(RLIMIT_NOFILE, &all);
    for (int signum = 1; signum < NSIG; signum++) signal(signum, SIG_DFL);
    signal(SIGPIPE, SIG_IGN);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    write_text("/proc/self/oom_score_adj", "-1000");
}

static void execute_in_path(const struct start *start) {
    const char *name = start->program->argv[0];
    bool forbidden = false;
    size_t name_size = strlen(name);
    for (const char *part = start->path;; part++) {
        size_t size = strcspn(part, ":");
        if (size + name_size + 2 <= sizeof candidate) {
            memcpy(candidate, part, size);
            candidate[size] = '/';
            memcpy(candidate + (size ? size + 1 : 0), name, name_size + 1);
            execve(candidate, (char *const *)start->program->argv,
                   (char *const *)start->program->environment);
            if (errno == EACCES) forbidden = true;
            else if (errno != ENOENT && errno != ENOTDIR) return;
        }
        part += size;
        if (!*part) break;
    }
    errno = forbidden ? EACCES : ENOENT;
}

static bool must_change(const struct identity *identity) {
    return identity->uid || identity->gid || identity->group_count || geteuid();
}

/* Turn the child into the program. Returns what failed, with errno. */
static const char *become(struct start *start) {
    const struct program *program = start->program;
    const struct identity *identity = program->identity;
    if (program->terminal ? setsid() < 0 : setpgid(0, program->group) < 0) return "process group";
    for (int fd = 0; fd < 3; fd++)
        if (dup2(program->stdio[fd], fd) < 0) return "standard streams";
    if (program->terminal && ioctl(0, TIOCSCTTY, 0)) return "controlling terminal";
    setrlimit(RLIMIT_NOFILE, &files_limit);
    signal(SIGPIPE, SIG_DFL);
    umask(022);
    write_text("/proc/self/oom_score_adj", "0");
    /* Change it while privileged, as container engines do: it may be closed to the user. */
    if (chdir(program->cwd)) return program->cwd;
    if (must_change(identity)) {
        if (syscall(SYS_setgroups, identity->group_count, identity->groups)) return "groups";
        if (syscall(SYS_setresgid, identity->gid, identity->gid, identity->gid)) return "group";
        if (syscall(SYS_setresuid, identity->uid, identity->uid, identity->uid)) return "user";
    }
    if (start->path) execute_in_path(start);
    else
        execve(program->argv[0], (char *const *)program->argv, (char *const *)program->environment);
    return program->argv[0];
}

static int child(void *argument) {
    struct start *start = argument;
    start->failed = become(start);
    start->error = errno;
    _exit(127);
}

static const char *path_of(const char *const *environment) {
    for (; *environment; environment++)
        if (!strncmp(*environment, "PATH=", 5)) return *environment + 5;
    return DEFAULT_PATH;
}

pid_t spawn(const struct program *program, const char **failed) {
    struct start start = {.program = program, .failed = "new process"};
    if (!*program->argv[0]) {
        *failed = "empty program name";
        errno = ENOENT;
        return -1;
    }
    if (!strchr(program->argv[0], '/')) start.path = path_of(program->environment);
    pid_t pid = -1;
    if (freezer_cgroup() >= 0)
        pid = clone_into_cgroup(freezer_cgroup(), child, stack, sizeof stack, &start);
    /* Start it anywhere else: whatever programs did to their cgroup must not keep others from
     * running. */
    if (pid < 0) pid = clone(child, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, &start);
    if (pid < 0) {
        start.error = errno;
    } else if (start.error) {
        waitpid(pid, NULL, 0);
        pid = -1;
    }
    *failed = start.failed;
    errno = start.error;
    return pid;
}

static bool has(const char *const *list, const char *variable) {
    size_t size = strcspn(variable, "=");
    for (; *list; list++)
        if (!strncmp(*list, variable, size) && ((*list)[size] == '=' || !(*list)[size]))
            return true;
    return false;
}

static size_t count(const char *const *list) {
    size_t size = 0;
    while (list[size]) size++;
    return size;
}

const char **merge_environment(const char *const *base, const char *const *extra, bool exact,
                               const char *home, bool terminal) {
    size_t slots = count(base) + count(extra) + 4, used = 0;
    size_t home_size = strlen("HOME=") + strlen(home) + 1;
    const char **merged = calloc(1, slots * sizeof *merged + home_size);
    if (!merged) return NULL;
    char *home_variable = (char *)(merged + slots);
    snprintf(home_variable, home_size, "HOME=%s", home);
    if (!exact)
        for (; *base; base++)
            if (!has(extra, *base)) merged[used++] = *base;
    for (; *extra; extra++) merged[used++] = *extra;
    if (exact) return merged;
    if (!has(merged, "PATH=")) merged[used++] = "PATH=" DEFAULT_PATH;
    if (!has(merged, "HOME=")) merged[used++] = home_variable;
    if (terminal && !has(merged, "TERM=")) merged[used++] = "TERM=xterm";
    return merged;
}
