#include "system/children.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

void child_watch(struct child *child, pid_t pid, void (*ended)(struct watch *, uint32_t)) {
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0) die("pidfd_open: %s", strerror(errno));
    child->pid = pid;
    watch_add(&child->ended, fd, EPOLLIN, ended);
}

bool child_ended(const struct child *child, struct ending *ending) {
    siginfo_t info = {0};
    struct rusage usage = {0};
    /* Call the kernel: libc's function does not tell the usage. */
    if (syscall(SYS_waitid, P_PID, child->pid, &info, WEXITED | WNOWAIT | WNOHANG, &usage) ||
        !info.si_pid)
        return false;
    ending->returncode = info.si_code == CLD_EXITED ? info.si_status : -info.si_status;
    ending->peak_rss_kib = (uint64_t)usage.ru_maxrss;
    return true;
}

void child_reap(struct child *child) {
    watch_drop(&child->ended);
    waitpid(child->pid, NULL, 0);
    child->pid = 0;
}

static void abandoned_ended(struct watch *watch, uint32_t events) {
    (void)events;
    struct child *child = CONTAINER(watch, struct child, ended);
    struct ending ending;
    if (!child_ended(child, &ending)) return;
    child_reap(child);
    free_later(child);
}

void child_abandon(struct child *child) {
    if (!child->pid) return;
    pid_t pid = child->pid;
    watch_drop(&child->ended);
    child->pid = 0;
    if (waitpid(pid, NULL, WNOHANG) == pid) return;
    struct child *orphan = must_alloc(sizeof *orphan);
    child_watch(orphan, pid, abandoned_ended);
}
