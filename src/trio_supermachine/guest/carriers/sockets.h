/* The socket carrier: each connection is a socket of AF_VSOCK (docs/wire.rst, "Carriers").
 *
 * Theory of operation
 *
 * The kernel has the packets, the credit and the states; this file makes its sockets behave as
 * core/conn.h promises. What differs from the serial carrier:
 *
 *  - What one turn sends is gathered in a buffer and is one system call. What the socket does not
 *    take is copied into `unsent`, and the user is not asked for more until that has gone. Events
 *    tell of room only after there was none.
 *  - Sockets that have something to take in are listed, and each reads once in its turn. A socket
 *    whose inbox keeps something is not read: the kernel's window then holds the host back.
 *  - AF_VSOCK tells by the end of data that the host has ended sending, and by the same that it has
 *    closed. A send of nothing tells the two apart: it fails on a closed socket (is_closed). Once
 *    this side has ended sending, too, nothing does, and nothing depends on it.
 *
 * A line has no state with a name, but flags: `readable` and `writable` as the kernel last told;
 * `closing`, an end is near, and only reading tells when; `broken`, nothing can be sent; `ending`,
 * end sending after what is unsent; `shut`, that has been done; `finishing`, close after what is
 * unsent; `rude`, the same without what cannot go at once. While `finishing` there is no user.
 *
 * Bounds: MAX_CONNECTIONS lines, beyond which the host's are closed at once (those that the agent
 * dials are bounded by who dials); per line one inbox of IN_SIZE and one `unsent` of OUT_SIZE.
 * A program in the guest can dial this machine's own address; take_connection closes what does not
 * come from the host's CID. A hostile host can close, reset and stop reading at any moment: a line
 * that is stuck costs its memory and nothing else. */
#pragma once

#include "core/conn.h"

/* Serve AF_VSOCK; or, in tests, unix sockets that are named after the ports, in this directory. */
const struct carrier *socket_carrier(const char *directory);
