/* Ports of this machine that are listened on, without the agent's own sockets.
 *
 * They are read from the kernel's tables in /proc/net. A program can listen as it likes, and tables
 * can be long; those that listen come first in them, and a table is read to the end of these. */
#pragma once

#include <sys/socket.h>

#include "core/session.h"

/* Leave this socket of the agent's out. */
void listeners_own(int fd);

/* Find a TCP port that is listened on, or a UDP socket on this port that anyone may send to. Port 0
 * is for TCP alone: the first that is listened on, which is then given. It stays the first as long
 * as it is listened on. `place` is an address that reaches it. False: there is none. */
bool listeners_find(uint32_t protocol, uint32_t *port, struct sockaddr_storage *place);

/* Send OK with the port to this session as soon as it is listened on with TCP; or OK with 0 after
 * this time. Port 0: any, of which the first is told. */
void listeners_await(struct session *session, uint32_t timeout_ms, uint32_t port);

/* Forget this session, which has gone. */
void listeners_forget(struct session *session);
