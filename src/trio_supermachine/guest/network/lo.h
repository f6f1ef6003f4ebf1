/* Loopback, the one network device of the machine. */
#pragma once

#include <stdbool.h>

/* Give it the machine's own addresses, by which programs see that there is a network, and make all
 * flow addresses local. `ip6` says whether that went for IPv6, too. False: for neither. */
bool lo_configure(bool *ip6);
