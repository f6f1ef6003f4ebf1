#include "power.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "exec.h"
#include "freezer.h"
#include "loop.h"
#include "workload.h"

bool machine_is_ours = true;

static bool shutting_down;
static int workload_stop_signal;
static unsigned waited_for;
static struct timer grace;

_Noreturn void power_off(void) {
    workload_kill();
    exec_kill_all();
    if (machine_is_ours) {
        sync();
        reboot(RB_POWER_OFF);
        reboot(RB_AUTOBOOT);
    }
    _exit(0);
}

static void grace_over(struct timer *timer) {
    (void)timer;
    power_off();
}

/* Whether it is a program that runs: neither a thread of the kernel nor a zombie. */
static bool is_program(pid_t pid) {
    char path[32], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    if (read_text(path, text, sizeof text) < 0) return false;
    char *after_name = strrchr(text, ')');
    char state;
    unsigned flags;
    if (!after_name || sscanf(after_name, ") %c %*d %*d %*d %*d %*d %u", &state, &flags) != 2)
        return false;
    return state != 'Z' && state != 'X' && !(flags & 0x00200000 /* PF_KTHREAD */);
}

static void wait_for_all(int signal_all);

static void program_ended(struct watch *watch, uint32_t events) {
    (void)events;
    watch_drop(watch);
    free_later(watch);
    if (--waited_for == 0) wait_for_all(SIGTERM); /* what they started meanwhile */
}

static void wait_for(pid_t pid) {
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0) return;
    struct watch *watch = must_alloc(sizeof *watch);
    watch_add(watch, fd, EPOLLIN, program_ended);
    waited_for++;
}

static void wait_for_all(int signal_all) {
    if (!machine_is_ours) power_off();
    DIR *processes = opendir("/proc");
    if (!processes) power_off();
    struct dirent *entry;
    while ((entry = readdir(processes))) {
        if (!isdigit((unsigned char)*entry->d_name)) continue;
        pid_t pid = atoi(entry->d_name);
        if (pid == 1 || pid == getpid() || !is_program(pid)) continue;
        kill(pid, pid == workload_pid() ? workload_stop_signal : signal_all);
        wait_for(pid);
    }
    closedir(processes);
    if (!waited_for) power_off();
}

static void begin(struct timer *timer) {
    (void)timer;
    freezer_thaw(); /* a frozen program cannot end as it would */
    if (!machine_is_ours) {
        workload_signal(workload_stop_signal);
        if (!workload_pid()) power_off();
        wait_for(workload_pid());
        return;
    }
    wait_for_all(SIGTERM);
}

void shut_down(uint32_t grace_ms, int stop_signal) {
    static struct timer now;
    if (shutting_down) return;
    shutting_down = true;
    workload_stop_signal = stop_signal;
    timer_set(&grace, now_ns() + grace_ms * NS_PER_MS, grace_over);
    timer_set(&now, 1, begin); /* in the next turn: the answer goes first */
}
