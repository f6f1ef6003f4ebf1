/* Programs' datagrams to the outside. Each pair of a program's address and a destination is a flow,
 * with a connection to the host of its own. */
#pragma once

#include <stdbool.h>

/* Take datagrams on the flow addresses, after egress_open. False: that cannot be, with errno. */
bool datagrams_open(bool ip6);
