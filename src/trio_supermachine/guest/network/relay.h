/* A program's TCP connection, and the host's side of it: bytes go both ways as they are. */
#pragma once

#include "core/conn.h"
#include "core/wire.h"

/* What is said to the host before the program's bytes, at the most. */
#define MAX_AHEAD 64

/* Who wants to know about a relay. */
struct relay_owner {
    void (*begun)(void); /* what is said ahead is out, or never will be */
    void (*over)(void);  /* it has ended */
};

/* Relay between a connection that has no user, or whose user lets it go by this, and a connected
 * socket, whose owner the relay is from now on. What of the host's has been received and not used
 * comes first. It ends by itself, when both sides have ended sending or one of them has reset its
 * connection: then the other is reset, too.
 *
 * `ahead` goes to the host first, the program's bytes right behind it. With `answered` the host's
 * bytes begin by its answer to that: OK, or else the program's connection is reset.
 * `owner` is NULL if nobody wants to know.
 *
 * Not from within a call of the connection's user. */
void relay_start(struct conn *conn, int socket_fd, const void *ahead, size_t ahead_size,
                 bool answered, const struct relay_owner *owner);
