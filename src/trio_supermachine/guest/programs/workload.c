#include "programs/workload.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/image.h"
#include "core/machine.h"
#include "programs/program.h"
#include "system/children.h"

#define PID_FILE "/run/supermachine-workload.pid"

struct waiter {
    struct session *session;
    struct waiter *next;
};

static enum { NONE, RUNNING, ENDED } phase;
static struct child workload = {.ended = {.fd = -1}};
static bool dropped; /* while RUNNING */
static pid_t group;
static struct ending result;
static uint64_t started_ns, ended_ns;
static struct waiter *waiters;

static void tell(struct session *session) {
    uint8_t payload[24];
    struct writer writer = {payload};
    write_u32(&writer, (uint32_t)result.returncode);
    write_u32(&writer, 0);
    write_u64(&writer, (ended_ns - started_ns) / 1000);
    write_u64(&writer, result.peak_rss_kib);
    session_send(session, EXIT, 0, payload, sizeof payload);
    session_finish(session);
}

static void end(void) {
    phase = ENDED;
    ended_ns = now_ns();
    while (waiters) tell(waiters->session); /* each is forgotten by that */
}

static void workload_ended(struct watch *watch, uint32_t events) {
    (void)watch, (void)events;
    if (phase != RUNNING || !child_ended(&workload, &result)) return;
    if (machine_is_ours) {
        child_reap(&workload);
        group = 0; /* its number may be another's soon */
    }
    if (!dropped) {
        end();
        return;
    }
    dropped = false;
    phase = NONE;
}

static void write_pid(const char *path) {
    char text[16];
    snprintf(text, sizeof text, "%d\n", (int)workload.pid);
    if (path && write_text(path, text)) say("%s: %s", path, strerror(errno));
}

int workload_start(const char *const *argv) {
    if (phase != NONE) return EBUSY;
    if (!*argv) return 0;
    const char *pid_path = machine_is_ours ? PID_FILE : NULL;
    static struct identity identity;
    char message[300];
    const char *failed = message;
    started_ns = now_ns();
    int error = find_identity(image.user, &identity, message, sizeof message);
    const char **environment = merge_environment(image.environment, (const char *const[]){NULL},
                                                 false, identity.home, false);
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    /* Let its user open /dev/stdout anew. It is the console, as this process's stderr is. */
    if (identity.uid && pid_path) (void)!fchown(2, identity.uid, (gid_t)-1);
    struct program program = {
        .argv = argv,
        .environment = environment,
        .cwd = image.workdir,
        .identity = &identity,
        .stdio = {null, 2, 2},
    };
    pid_t pid = error || !environment || null < 0 ? -1 : spawn(&program, &failed);
    if (pid < 0 && !error) error = errno;
    if (null >= 0) close(null);
    free(environment);
    if (pid < 0) {
        say("workload: %s: %s", failed, strerror(error));
        result.returncode = error == ENOENT ? 127 : 126;
        end();
        return 0;
    }
    phase = RUNNING;
    group = pid;
    child_watch(&workload, pid, workload_ended);
    write_pid(pid_path);
    return 0;
}

static bool runs(void) { return phase == RUNNING && !dropped; }

int workload_pid(void) { return runs() ? workload.pid : 0; }

int workload_signal(int signum) {
    if (!runs()) return ESRCH;
    return kill(workload.pid, signum) ? errno : 0;
}

void workload_kill(void) {
    if (group) kill(-group, SIGKILL);
}

void workload_drop(void) {
    if (phase == RUNNING) dropped = true;
    else phase = NONE;
}

void workload_await(struct session *session) {
    if (phase == NONE || dropped) {
        session_fail(session, ESRCH, 0, "the image has no workload");
    } else if (phase == ENDED) {
        tell(session);
    } else {
        struct waiter *waiter = must_alloc(sizeof *waiter);
        waiter->session = session;
        waiter->next = waiters;
        waiters = waiter;
    }
}

void workload_forget(struct session *session) {
    for (struct waiter **link = &waiters; *link; link = &(*link)->next)
        if ((*link)->session == session) {
            struct waiter *waiter = *link;
            *link = waiter->next;
            free(waiter);
            return;
        }
}
