/* The network that programs see: the machine's own addresses, the way out, and a resolver. */
#pragma once

#include "core/conn.h"

/* Open it in a machine that is set up, before its programs run. What this kernel cannot do is left
 * out, with a line on the console. */
void network_open(const struct carrier *carrier);
