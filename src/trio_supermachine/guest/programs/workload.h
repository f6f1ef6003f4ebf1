/* The image's own program, supervised. */
#pragma once

#include "core/session.h"

/* Start it. A failure to do so is the workload's end, with 127 or 126. */
void workload_start(const char *const *argv, const char *pid_path);

/* 0, or ESRCH and whatever kill(2) says. */
int workload_signal(int signum);

/* Its process, 0 when there is none (any more). */
int workload_pid(void);

void workload_kill(void);

/* EXIT to this session when it has ended; ERROR at once if there never was one. */
void workload_await(struct session *session);

/* This session does not wait any more. */
void workload_forget(struct session *session);
