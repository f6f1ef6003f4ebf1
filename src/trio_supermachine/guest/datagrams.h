/* Programs' datagrams to the outside. Each pair of a program's address and a destination is a flow,
 * with a connection to the host of its own. */
#pragma once

#include "conn.h"

/* False: that cannot be, with errno. */
bool datagrams_open(const struct carrier *carrier, bool ip6);
