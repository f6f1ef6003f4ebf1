#include "life/power.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#include "core/image.h"
#include "core/loop.h"
#include "core/machine.h"
#include "programs/exec.h"
#include "programs/freezer.h"
#include "programs/workload.h"

/* Time that the host has to end the machine, before it powers off by itself. */
#define FOR_THE_HOST_MS 100

static bool shutting_down;
static struct session *asked; /* for the shutdown; NULL: nobody, or it has gone */
static unsigned waited_for;
static struct timer grace;

static void end_and_write_all(void) {
    workload_kill();
    exec_kill_all();
    if (!machine_is_ours) return;
    tcdrain(STDERR_FILENO); /* the console */
    sync();
}

_Noreturn void power_off(void) {
    end_and_write_all();
    if (machine_is_ours) {
        reboot(RB_POWER_OFF);
        reboot(RB_AUTOBOOT);
    }
    _exit(0);
}

static void power_off_by(struct timer *timer) {
    (void)timer;
    power_off();
}

/* Tell the host that all is written, so that it ends the machine. That is quicker than to power
 * off, and nothing is missed. */
static void leave(void) {
    if (!asked) power_off();
    end_and_write_all();
    session_send_ok(asked, ALL_IS_WRITTEN);
    session_finish(asked);
    timer_set(&grace, now_ns() + FOR_THE_HOST_MS * NS_PER_MS, power_off_by);
}

/* Say whether a process is a program that runs: neither a thread of the kernel nor a zombie. Most
 * threads of the kernel are told by their group, 0, which is quick to ask for; /proc is slow. */
static bool is_program(pid_t pid) {
    if (getpgid(pid) <= 0) return false;
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
    if (--waited_for == 0) wait_for_all(SIGTERM); /* for what they started meanwhile */
}

static void wait_for(pid_t pid) {
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0) return;
    struct watch *watch = must_alloc(sizeof *watch);
    watch_add(watch, fd, EPOLLIN, program_ended);
    waited_for++;
}

static void wait_for_all(int signal_all) {
    DIR *processes = machine_is_ours ? opendir("/proc") : NULL;
    if (!processes) {
        leave();
        return;
    }
    struct dirent *entry;
    while ((entry = readdir(processes))) {
        if (!isdigit((unsigned char)*entry->d_name)) continue;
        pid_t pid = atoi(entry->d_name);
        if (pid == 1 || pid == getpid() || !is_program(pid)) continue;
        kill(pid, pid == workload_pid() ? image.stop_signal : signal_all);
        wait_for(pid);
    }
    closedir(processes);
    if (!waited_for) leave();
}

static void begin(struct timer *timer) {
    (void)timer;
    freezer_thaw(); /* a frozen program cannot end as it would */
    if (!machine_is_ours) {
        workload_signal(image.stop_signal);
        if (workload_pid()) wait_for(workload_pid());
        else leave();
        return;
    }
    wait_for_all(SIGTERM);
}

static void grace_over(struct timer *timer) {
    (void)timer;
    leave();
}

void shut_down(struct session *session, uint32_t grace_ms) {
    static struct timer now;
    if (shutting_down) {
        session_send_ok(session, 0);
        session_finish(session);
        return;
    }
    shutting_down = true;
    asked = session;
    timer_set(&grace, now_ns() + grace_ms * NS_PER_MS, grace_over);
    timer_set(&now, 1, begin); /* not now: what ends may be in use in this turn */
}

void shut_down_forget(struct session *session) {
    if (asked == session) asked = NULL;
}
