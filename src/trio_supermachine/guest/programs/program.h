/* Start one program, cheaply, and find out why when it cannot be started. */
#pragma once

#include "system/users.h"

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

struct program {
    const char *const *argv;
    const char *const *environment;
    const char *cwd;
    const struct identity *identity;
    int stdio[3];
    bool terminal; /* stdio[0] becomes the controlling terminal of a new session */
    pid_t group;   /* the process group to join; 0: its own */
};

/* The pid, or -1 with errno as the failing call left it; `failed` then names the thing. */
pid_t spawn(const struct program *program, const char **failed);

/* Once, at the start: remember what children get back of what this process changes for itself. */
void spawn_init(void);

/* `base` and over it `extra`, both NAME=value; then PATH, HOME and (for a terminal) TERM where
 * missing, unless `exact`. A single block for free(). NULL: out of memory. */
const char **merge_environment(const char *const *base, const char *const *extra, bool exact,
                               const char *home, bool terminal);
