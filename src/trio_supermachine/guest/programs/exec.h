/* The action EXEC: one program, or several in a row, with streams to the host.
 *
 * States of one exec: its files are staged; it starts, or waits for the freezer; it runs, stage by
 * stage; it has exited, and its streams are drained; it is gone. The exec goes away with its
 * session, at whatever moment that is, and SIGKILL to its process group goes with it.
 *
 * The first process of an exec stays a zombie until the exec is gone. So its pid, which is the
 * group's, can be no other's, and kill_group never hits a stranger. With a terminal each stage is a
 * session of its own, and so has a group of its own. */
#pragma once

#include "core/session.h"

extern const struct action exec_action;

/* SIGKILL the groups of all execs. */
void exec_kill_all(void);
