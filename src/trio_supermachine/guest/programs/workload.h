/* The workload: the image's own program. It is started once, at set-up, and supervised. */
#pragma once

#include "core/session.h"

/* Start it, and write its pid to this file, unless NULL. If it cannot be started, it counts as
 * ended with 127 (there is no such program) or 126. */
void workload_start(const char *const *argv, const char *pid_path);

/* Signal it. 0, or ESRCH when it does not run, or what kill(2) says. */
int workload_signal(int signum);

/* Return its pid, or 0 when it does not run. */
int workload_pid(void);

/* SIGKILL its process group. */
void workload_kill(void);

/* Send EXIT to this session when it has ended; ERROR at once if there never was one. */
void workload_await(struct session *session);

/* Forget this session, which has gone. */
void workload_forget(struct session *session);
