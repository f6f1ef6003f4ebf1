/* The action EXEC. */
#pragma once

#include "session.h"

extern const struct action exec_action;

/* Start those that came while nothing could be started. */
void exec_start_held(void);

/* SIGKILL to the groups of all execs. */
void exec_kill_all(void);
