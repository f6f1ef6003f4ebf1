/* PID 1 of the guest: it mounts what the initramfs needs, starts the agent as its child, and reaps
 * for ever. When the agent ends, the machine powers off. PID 1 reads nothing from anyone: so
 * nothing in the guest or outside can bring it down, and the kernel with it.
 *
 * The same program is the agent in tests, and one that does nothing (--trial). */

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"
#include "core/util.h"
#include "system/modules.h"
#include "system/mount.h"

#define FILES_SOFT 1024
#define FILES_HARD 524288

static void open_console(void) {
    int fd = open("/dev/console", O_RDWR | O_NOCTTY);
    if (fd < 0) return;
    for (int standard = 0; standard < 3; standard++) dup2(fd, standard);
    if (fd > 2) close(fd);
}

static void bring_loopback_up(void) {
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request)) say("lo: %s", strerror(errno));
    if (fd >= 0) close(fd);
}

/* Set the limits that every program of the guest inherits. */
static void set_limits(void) {
    struct rlimit files = {FILES_SOFT, FILES_HARD};
    struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY};
    setrlimit(RLIMIT_NOFILE, &files);
    setrlimit(RLIMIT_NPROC, &none);
}

_Noreturn static void reap_until_gone(pid_t agent) {
    int status;
    for (;;) {
        pid_t pid = waitpid(-1, &status, 0);
        if (pid == agent) break;
    }
    if (WIFSIGNALED(status)) say("the agent was killed by signal %d", WTERMSIG(status));
    else say("the agent ended with status %d", WEXITSTATUS(status));
    sync();
    reboot(RB_POWER_OFF);
    reboot(RB_AUTOBOOT);
    for (;;) pause();
}

_Noreturn static void run_as_init(void) {
    mount_early();
    open_console();
    load_modules();
    bring_loopback_up();
    set_limits();
    pid_t agent = fork();
    if (agent < 0) say("fork: %s", strerror(errno));
    if (agent == 0) agent_run();
    reap_until_gone(agent);
}

/* Open what is missing of descriptors 0 to 2: none of the agent's own may become a standard stream
 * of a program. */
static void open_missing_streams(void) {
    int fd;
    do fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd < 3);
    if (fd >= 0) close(fd);
    syscall(SYS_close_range, 3, ~0u, 4 /* CLOSE_RANGE_CLOEXEC */);
}

int main(int count, char **arguments) {
    if (getpid() == 1 && count < 2) run_as_init();
    /* Do nothing: warm-ups need a program that every guest has. */
    if (count == 2 && !strcmp(arguments[1], "--trial")) return 0;
    if (count == 5 && !strcmp(arguments[3], "--root") && (chroot(arguments[4]) || chdir("/")))
        die("%s: %s", arguments[4], strerror(errno));
    open_missing_streams();
    if ((count == 3 || count == 5) && !strcmp(arguments[1], "--agent-on-fd"))
        agent_run_on_fd(atoi(arguments[2]));
    if (count == 3 && !strcmp(arguments[1], "--agent-on-sockets"))
        agent_run_on_sockets(arguments[2]);
    fprintf(stderr,
            "usage: init --agent-on-fd N [--root DIR] | --agent-on-sockets DIR | --trial\n");
    return 2;
}
