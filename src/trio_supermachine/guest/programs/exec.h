/* The action EXEC. */
#pragma once

#include "core/session.h"

extern const struct action exec_action;

/* SIGKILL to the groups of all execs. */
void exec_kill_all(void);
