/* The one network device of the machine. */
#pragma once

#include <stdbool.h>

/* Give it the guest's own addresses, by which programs see that there is a network, and let
 * all flow addresses be local. `ip6` is whether there is IPv6. False: neither. */
bool lo_configure(bool *ip6);
