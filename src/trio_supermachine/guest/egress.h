/* The way out: what the hooks lead here goes on to the host, which opens the real connection. */
#pragma once

#include <sys/socket.h>

#include "conn.h"
#include "wire.h"

/* The first frame of a connection with the host for the outside. */
#define OPEN_SIZE (FRAME_HEADER + 24u)

/* Accept programs' connections on the flow addresses. False: that cannot be, with errno. */
bool egress_open(const struct carrier *carrier, bool ip6);

/* A socket of the agent's, on the flow addresses of one family; -1 with errno. */
int flow_socket(int family, int type);

/* The address that a program was led to, as an OPEN frame for the place that it asked for.
 * False: it is none, or stands for nothing any more. */
bool flow_request(const struct sockaddr *address, uint32_t protocol, uint8_t frame[OPEN_SIZE]);
