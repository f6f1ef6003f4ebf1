/* The lifeline: it sets the guest up, or makes a restored one its own, and the guest lives as long
 * as it. */
#pragma once

#include "core/conn.h"

/* Dial the host. Once set up, execs and the like are taken on AGENT_PORT. */
void lifeline_open(const struct carrier *carrier);
