/* A relay: a TCP connection of a program and a connection with the host, whose bytes go both ways
 * as they are.
 *
 * Ends are relayed, too. When one side ends sending, the other is told, and its bytes still come.
 * When both have, the relay is over. When one side is reset, the other is reset: the host at once;
 * the program's bytes that came before a reset of its own still go out first (`deaf`).
 *
 * Nothing is buffered here. The program's bytes are read straight into the carrier's buffer, when
 * it is this connection's turn. The host's bytes stay in the carrier's inbox until the program's
 * socket takes them. */
#pragma once

#include "core/conn.h"
#include "core/wire.h"

/* Bound on what is said ahead. */
#define MAX_AHEAD 64

/* Who wants to know about a relay. */
struct relay_owner {
    void (*begun)(void); /* what is said ahead is out, or never will be */
    void (*over)(void);
};

/* Relay between a connection, whose user lets it go by this, and a connected socket, which the
 * relay owns from now on. Bytes of the host that were received and not used come first.
 *
 * `ahead` is said to the host ahead of the program's bytes. `answered`: the host's bytes begin with
 * its answer to that, which is taken away; if it is not OK, the relay is reset. `owner` may be
 * NULL.
 *
 * Do not call this from within a call of the connection's user. */
void relay_start(struct conn *conn, int socket_fd, const void *ahead, size_t ahead_size,
                 bool answered, const struct relay_owner *owner);
