/* The serial carrier: vsock packets back to back over one port. See docs/reference/wire.rst,
 * "Carriers". */
#pragma once

#include "core/conn.h"

/* Serve this descriptor. `end` is called when the other side has gone for good or breaks the
 * protocol, with the reason; `hangs_up`: reading nothing means that it has gone. */
const struct carrier *serial_carrier(int fd, bool hangs_up, void (*end)(const char *reason));
