/* What of this machine's ports is listened on. The agent's own sockets are not counted. */
#pragma once

#include <sys/socket.h>

#include "core/session.h"

/* This socket is the agent's own. */
void listeners_own(int fd);

/* Where a TCP port is listened on, or a UDP socket is bound that anyone may send to; for TCP's port
 * 0 the first, whose port is given, too: the first that this knew of, as long as it is listened on.
 * A place that programs reach: loopback for a socket that is bound to none. False: there is
 * nothing. */
bool listeners_find(uint32_t protocol, uint32_t *port, struct sockaddr_storage *place);

/* OK with the port to this session as soon as it is listened on with TCP, or with 0 after this
 * time. Port 0: any, of which the first is told. */
void listeners_await(struct session *session, uint32_t timeout_ms, uint32_t port);

/* This session does not wait any more. */
void listeners_forget(struct session *session);
