/* The lifeline: the agent's connection to the host that sets the machine up, or makes a copy its
 * own. The machine lives as long as it has one.
 *
 * Phases: BOOTED -> RUNNING at SETUP -> COPIED when the lifeline has gone -> RUNNING at RESTORE.
 * A machine that runs and loses its lifeline may be a copy, whose connections are those of the
 * original: so it dials once more. If that is refused, or ends before READY, the machine powers
 * off. A host that is done with a machine kills it, so that nobody waits for that.
 *
 * Order at SETUP: random numbers and clock, root, freezer, names, network; then the image is known,
 * port AGENT_PORT is listened on, the workload starts, and READY is sent. Order at RESTORE: random
 * numbers, clock, identity and names first; then programs are thawed, and READY is sent. */
#pragma once

#include "core/conn.h"

/* Dial the host. Once the machine is set up, connections are taken on AGENT_PORT. */
void lifeline_open(const struct carrier *carrier);
