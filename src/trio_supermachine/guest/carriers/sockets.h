/* The carrier on an engine with a virtio-vsock device: each connection is a socket. */
#pragma once

#include "core/conn.h"

/* AF_VSOCK; or, for tests, unix sockets named after the ports in this directory. */
const struct carrier *socket_carrier(const char *directory);
