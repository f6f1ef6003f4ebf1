/* The machine that this process runs in. */
#pragma once

#include <stdbool.h>

/* False in tests: the agent is an ordinary process of the host then. It leaves the host's mounts,
 * clock and names alone, and at the end kills what it started, and exits. */
extern bool machine_is_ours;

/* Say whether the kernel's command line names this carrier as supermachine.channel. */
bool channel_is(const char *wanted);
