/* The machine that this process runs in. */
#pragma once

#include <stdbool.h>

/* In tests there is no machine to set up or to power off: the agent is an ordinary process of the
 * host then, and what it ends is what it started, and itself. */
extern bool machine_is_ours;

/* Whether the kernel's command line names this carrier as supermachine.channel. */
bool channel_is(const char *wanted);
