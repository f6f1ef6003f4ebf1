/* The kernel's BPF: the hooks of bpf/ on all programs, and the map that they fill. */
#pragma once

#include "flow.h"
#include "util.h"

/* Load the hooks and attach them to the root cgroup; without `ip6`, those of IPv4. False: this
 * kernel cannot, which the console tells. */
bool hooks_attach(bool ip6);

/* What an id stands for. False: nothing (any more). */
bool destination_find(uint32_t id, struct destination *destination);
