/* The lifeline: it sets the guest up, and the guest lives as long as it. */
#pragma once

#include "conn.h"

/* Dial the host. Once set up, execs and the like are taken on AGENT_PORT. */
void lifeline_open(const struct carrier *carrier);

void set_clock(uint64_t realtime_ns);

/* From set-up; SIGTERM before. */
extern int stop_signal;
