/* The kernel's BPF: the hooks of bpf/ on all programs, and the map that they fill. */
#pragma once

#include "bpf/flow.h"
#include "core/util.h"

/* Load the hooks and attach them to the root cgroup. False: this kernel cannot, which the console
 * tells. Those of IPv6 are for IPv4 in its sockets, too. */
bool hooks_attach(void);

/* What an id stands for. False: nothing (any more). */
bool destination_find(uint32_t id, struct destination *destination);
