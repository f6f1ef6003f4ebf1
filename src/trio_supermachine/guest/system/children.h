/* The processes that the agent itself starts, and their ends. */
#pragma once

#include <sys/types.h>

#include "core/loop.h"

struct child {
    pid_t pid; /* 0: none */
    struct watch ended;
    void *owner; /* the starter's */
};

/* How a process ended. */
struct ending {
    int returncode; /* as in subprocess: negative for a signal */
    uint64_t peak_rss_kib;
};

/* Watch a process that was just started; `ended` may be spurious: see child_ended. */
void child_watch(struct child *child, pid_t pid, void (*ended)(struct watch *, uint32_t));

/* Whether it has ended, and how. It stays a zombie, so that its pid and its group remain its own.
 */
bool child_ended(const struct child *child, struct ending *ending);

/* Let a zombie go. */
void child_reap(struct child *child);

/* Nobody cares any more, if there is one: it is reaped when it ends. */
void child_abandon(struct child *child);
