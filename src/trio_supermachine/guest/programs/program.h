/* Start one program, quickly, and say why if it cannot be started. */
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
    pid_t group;   /* the process group to join; 0: a new one */
};

/* Start a program. Returns its pid when it has executed; or -1 with the errno of the call that
 * failed, and in `failed` what that was about. */
pid_t spawn(const struct program *program, const char **failed);

/* Prepare this process. Once, at the start: programs get back the limits that it had before. */
void spawn_init(void);

/* Put `extra` over `base`, both lists of NAME=value; then add PATH, HOME and (for a terminal) TERM
 * where missing, unless `exact`. Returns one block for free(). NULL: out of memory. */
const char **merge_environment(const char *const *base, const char *const *extra, bool exact,
                               const char *home, bool terminal);
