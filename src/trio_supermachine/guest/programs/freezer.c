#include "programs/freezer.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/loop.h"
#include "core/machine.h"
#include "system/unique.h"

#define CGROUP "/sys/fs/cgroup/guest"
#define MAX_CGROUPS 64u   /* frozen at once */
#define YIELDS 4          /* ahead of waiting for an event */
#define PATIENCE_MS 2000u /* for all cgroups together */

static int cgroup = -1;         /* directory of the one that programs begin in */
static int frozen[MAX_CGROUPS]; /* directories of those that were told to freeze */
static size_t frozen_count;
static enum { THAWED, FREEZING, FROZEN } state;
static struct session *waiting;           /* for FREEZING to end */
static struct watch changes = {.fd = -1}; /* of the cgroup that was told last */
static struct timer patience;
static struct start_held *first_held;

void freezer_open(void) {
    if (!mkdir(CGROUP, 0755) || errno == EEXIST)
        cgroup = open(CGROUP, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (cgroup < 0) say(CGROUP ": %s", strerror(errno));
}

int freezer_cgroup(void) { return cgroup; }

/* --- starts that wait --- */

bool freezer_allows(struct start_held *held, void (*start)(struct start_held *)) {
    if (state == THAWED) return true;
    struct start_held **link = &first_held;
    while (*link) link = &(*link)->next;
    held->start = start;
    held->next = NULL;
    *link = held;
    return false;
}

void freezer_withdraw(struct start_held *held) {
    if (!held->start) return;
    struct start_held **link = &first_held;
    while (*link != held) link = &(*link)->next;
    *link = held->next;
    held->start = NULL;
}

static void start_held(void) {
    struct start_held *held;
    while ((held = first_held)) {
        void (*start)(struct start_held *) = held->start;
        freezer_withdraw(held);
        start(held);
    }
}

/* --- the cgroups --- */

/* Write into a file of a cgroup; return 0 or the error. */
static int write_at(int directory, const char *name, const char *word) {
    int fd = openat(directory, name, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return errno;
    int error = write(fd, word, strlen(word)) < 0 ? errno : 0;
    close(fd);
    return error;
}

static int command(int directory, const char *word) {
    errno = write_at(directory, "cgroup.freeze", word);
    return errno ? -1 : 0;
}

/* Say whether a cgroup is told to freeze already: by this freezer, or by the guest itself, which
 * then has to thaw it. */
static bool is_told_to_freeze(int directory) {
    char word = '1';
    int fd = openat(directory, "cgroup.freeze", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return true;
    if (read(fd, &word, 1) != 1) word = '1';
    close(fd);
    return word == '1';
}

/* Find a cgroup that a program has made beside `guest`, and that is not frozen. -1: no more. */
static int find_other(void) {
    int fd = openat(cgroup, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC), found = -1;
    DIR *top = fd < 0 ? NULL : fdopendir(fd);
    if (!top) {
        if (fd >= 0) close(fd);
        return -1;
    }
    struct dirent *entry;
    while (found < 0 && (entry = readdir(top))) {
        if (entry->d_type != DT_DIR || *entry->d_name == '.') continue;
        found = openat(fd, entry->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (found >= 0 && is_told_to_freeze(found)) {
            close(found);
            found = -1;
        }
    }
    closedir(top);
    return found;
}

/* --- freezing, one cgroup after the other --- */

static struct session *end_wait(void) {
    struct session *session = waiting;
    waiting = NULL;
    watch_drop(&changes);
    timer_clear(&patience);
    return session;
}

static void thaw(void) {
    if (state == THAWED) return;
    while (frozen_count) {
        int directory = frozen[--frozen_count];
        if (command(directory, "0")) say("thaw: %s", strerror(errno));
        if (directory != cgroup) close(directory);
    }
    state = THAWED;
    start_held();
}

static void give_up(int error) {
    struct session *session = end_wait();
    thaw();
    session_fail(session, error, 0, "freezing: %s", strerror(error));
}

/* Say whether the cgroup that was told last is frozen. */
static bool is_frozen(void) {
    char text[128];
    ssize_t size = pread(changes.fd, text, sizeof text - 1, 0);
    if (size < 0) return errno == ENODEV; /* it was removed, and so was empty */
    text[size] = 0;
    return strstr(text, "frozen 1");
}

static void changed(struct watch *watch, uint32_t events);

static int begin(int directory) {
    frozen[frozen_count++] = directory;
    int fd = openat(directory, "cgroup.events", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    watch_add(&changes, fd, EPOLLPRI, changed);
    return command(directory, "1");
}

/* Give programs the processor a few times: those that can freeze do so when they run next. That is
 * often quicker than to wait for the event, which comes every 10 ms at the most. */
static bool is_frozen_soon(void) {
    for (int yields = 0; yields < YIELDS; yields++) {
        if (is_frozen()) return true;
        sched_yield();
    }
    return is_frozen();
}

static void go_on(void) {
    while (is_frozen_soon()) {
        watch_drop(&changes);
        int other = frozen_count < MAX_CGROUPS ? find_other() : -1;
        if (other < 0) {
            state = FROZEN;
            if (machine_is_ours) prepare_renewal();
            struct session *session = end_wait();
            session_send_ok(session, 0);
            session_finish(session);
            return;
        }
        if (begin(other)) {
            give_up(errno);
            return;
        }
    }
}

static void changed(struct watch *watch, uint32_t events) {
    (void)watch, (void)events;
    go_on();
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
    if (begin(cgroup)) {
        give_up(errno);
        return;
    }
    timer_set(&patience, now_ns() + PATIENCE_MS * NS_PER_MS, patience_over);
    go_on();
}

void freezer_thaw(void) {
    if (waiting) give_up(ECANCELED);
    else thaw();
}

/* Wait until a cgroup has no process that lives, or until `deadline`. */
static void await_empty(int directory, uint64_t deadline) {
    int fd = openat(directory, "cgroup.events", O_RDONLY | O_CLOEXEC);
    for (;;) {
        char text[128];
        ssize_t size = pread(fd, text, sizeof text - 1, 0);
        if (size < 0) break; /* it was removed, so nothing was in it */
        text[size] = 0;
        uint64_t now = now_ns();
        if (strstr(text, "populated 0") || now >= deadline) break;
        struct pollfd change = {.fd = fd, .events = POLLPRI};
        poll(&change, 1, (int)((deadline - now) / NS_PER_MS + 1));
    }
    if (fd >= 0) close(fd);
}

int freezer_kill(void) {
    int killed[MAX_CGROUPS], error = 0;
    size_t killed_count = 0;
    int top = openat(cgroup, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *directories = top < 0 ? NULL : fdopendir(top);
    if (!directories) {
        error = errno;
        if (top >= 0) close(top);
        return error;
    }
    struct dirent *entry;
    while (!error && (entry = readdir(directories))) {
        if (entry->d_type != DT_DIR || *entry->d_name == '.') continue;
        int directory = openat(top, entry->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (directory < 0) continue; /* it was removed, so nothing was in it */
        error = write_at(directory, "cgroup.kill", "1");
        if (!error && killed_count < MAX_CGROUPS) killed[killed_count++] = directory;
        else close(directory);
    }
    closedir(directories);
    if (!error) thaw();
    uint64_t deadline = now_ns() + PATIENCE_MS * NS_PER_MS;
    while (killed_count) {
        if (!error) await_empty(killed[killed_count - 1], deadline);
        close(killed[--killed_count]);
    }
    return error;
}

void freezer_forget(struct session *session) {
    if (session != waiting) return;
    end_wait();
    thaw();
}
