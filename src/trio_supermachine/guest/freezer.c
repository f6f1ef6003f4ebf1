#include "freezer.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "exec.h"
#include "loop.h"

#define CGROUP "/sys/fs/cgroup/guest"
#define PATIENCE_MS 2000u /* a process in the kernel freezes when it comes out */

static int cgroup = -1;
static enum { THAWED, FREEZING, FROZEN } state;
static struct session *waiting; /* for FREEZING to end */
static struct watch changes = {.fd = -1};
static struct timer patience;

void freezer_open(void) {
    if (!mkdir(CGROUP, 0755) || errno == EEXIST)
        cgroup = open(CGROUP, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (cgroup < 0) say(CGROUP ": %s", strerror(errno));
}

int freezer_cgroup(void) { return cgroup; }

bool freezer_holds(void) { return state != THAWED; }

static int command(const char *word) {
    int fd = openat(cgroup, "cgroup.freeze", O_WRONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t written = write(fd, word, strlen(word));
    int error = errno;
    close(fd);
    errno = error;
    return written < 0 ? -1 : 0;
}

static struct session *end_wait(void) {
    struct session *session = waiting;
    waiting = NULL;
    watch_drop(&changes);
    timer_clear(&patience);
    return session;
}

static void thaw(void) {
    if (state == THAWED) return;
    if (command("0")) say("thaw: %s", strerror(errno));
    state = THAWED;
    exec_start_held();
}

static void give_up(int error) {
    struct session *session = end_wait();
    thaw();
    session_fail(session, error, 0, "freezing: %s", strerror(error));
}

static void look(void) {
    char text[128];
    ssize_t size = pread(changes.fd, text, sizeof text - 1, 0);
    if (size < 0) {
        give_up(errno);
        return;
    }
    text[size] = 0;
    if (!strstr(text, "frozen 1")) return;
    state = FROZEN;
    struct session *session = end_wait();
    session_send_ok(session, 0);
    session_finish(session);
}

static void changed(struct watch *watch, uint32_t events) {
    (void)watch, (void)events;
    look();
}

static void patience_over(struct timer *timer) {
    (void)timer;
    give_up(ETIMEDOUT);
}

void freezer_freeze(struct session *session) {
    if (cgroup < 0 || waiting) {
        int error = waiting ? EBUSY : EOPNOTSUPP;
        session_fail(session, error, 0, "freezing: %s", strerror(error));
        return;
    }
    if (state == FROZEN) {
        session_send_ok(session, 0);
        session_finish(session);
        return;
    }
    waiting = session;
    state = FREEZING;
    int fd = openat(cgroup, "cgroup.events", O_RDONLY | O_CLOEXEC);
    if (fd >= 0) watch_add(&changes, fd, EPOLLPRI, changed);
    if (fd < 0 || command("1")) {
        give_up(errno);
        return;
    }
    timer_set(&patience, now_ns() + PATIENCE_MS * NS_PER_MS, patience_over);
    look();
}

void freezer_thaw(void) {
    if (waiting) give_up(ECANCELED);
    else thaw();
}

void freezer_forget(struct session *session) {
    if (session != waiting) return;
    end_wait();
    thaw();
}
