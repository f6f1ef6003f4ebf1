/* Hooks of bpf/hooks.c on all programs, and the map that they fill. */
#pragma once

#include "bpf/flow.h"
#include "core/util.h"

/* Load the hooks and attach them to the root cgroup. Those of IPv6 see IPv4 in sockets of IPv6,
 * too. False: this kernel cannot, and the console says why. */
bool hooks_attach(void);

/* Find the destination that an id stands for. False: none (any more). */
bool destination_find(uint32_t id, struct destination *destination);
