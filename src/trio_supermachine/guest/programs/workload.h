/* The workload: the image's own program. It is started once, at set-up or later, and supervised. */
#pragma once

#include "core/session.h"

/* Start it; an empty vector is none. In a machine of its own its pid is in PID_FILE. If it cannot be
 * started, it counts as ended with 127 (there is no such program) or 126. Return 0, or EBUSY when
 * there is or was one. */
int workload_start(const char *const *argv);

/* Signal it. 0, or ESRCH when it does not run, or what kill(2) says. */
int workload_signal(int signum);

/* Return its pid, or 0 when it does not run. */
int workload_pid(void);

/* SIGKILL its process group. */
void workload_kill(void);

/* Do not count it any more: it is being killed, and from now on there never was one. */
void workload_drop(void);

/* Send EXIT to this session when it has ended; ERROR at once if there never was one. */
void workload_await(struct session *session);

/* Forget this session, which has gone. */
void workload_forget(struct session *session);
