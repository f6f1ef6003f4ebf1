/* The network that programs see: the guest's addresses, and the way out, which is the agent. */
#pragma once

#include "core/conn.h"

/* In a set-up machine, before its programs run. What this kernel cannot do stays undone, and the
 * console tells. */
void network_open(const struct carrier *carrier);
