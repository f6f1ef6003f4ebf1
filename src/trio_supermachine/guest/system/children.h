/* Processes that the agent starts, and their ends. */
#pragma once

#include <sys/types.h>

#include "core/loop.h"

struct child {
    pid_t pid; /* 0: none */
    struct watch ended;
    void *owner; /* who started it */
};

/* The end of a process. */
struct ending {
    int returncode; /* as in subprocess: negative for a signal */
    uint64_t peak_rss_kib;
};

/* Watch a process that was just started. `ended` may be called for nothing: see child_ended. */
void child_watch(struct child *child, pid_t pid, void (*ended)(struct watch *, uint32_t));

/* Say whether it has ended, and how. It stays a zombie, so that its pid is no other's. */
bool child_ended(const struct child *child, struct ending *ending);

/* Reap it. It must have ended. */
void child_reap(struct child *child);

/* Leave it to itself, if there is one: it is reaped when it ends. */
void child_abandon(struct child *child);
