/* Datagrams between the host and a program that has bound a port: each is a frame of DATA. */
#pragma once

#include "core/session.h"

/* Go on with a connected UDP socket, which the session owns from now on. What the socket refuses is
 * lost, as datagrams are. */
void udp_start(struct session *session, int socket_fd);
