/* The way out: what the hooks lead here goes on to the host, which opens the real connection. */
#pragma once

#include <sys/socket.h>

#include "core/conn.h"
#include "core/loop.h"
#include "core/wire.h"

/* The first frame of a connection with the host for the outside. */
#define OPEN_SIZE (FRAME_HEADER + 24u)

/* Accept programs' connections on the flow addresses. False: that cannot be, with errno. */
bool egress_open(const struct carrier *carrier, bool ip6);

/* A socket of the agent's, on the flow addresses of one family, that is watched; -1 with errno. */
int flow_socket(struct watch *watch, int family, int type,
                void (*ready)(struct watch *watch, uint32_t events));

/* Look at it again, which has not been used up. */
void flow_socket_again(struct watch *watch);

/* A connection to the host; NULL: there can be none now. For each, egress_dialled is called when
 * its OPEN is out, or never will be. */
struct conn *egress_dial(void);
void egress_dialled(void);

/* Whether the host may be dialled. If not, all sockets are looked at again when it may. */
bool egress_may_dial(void);

/* The address that a program was led to, as an OPEN frame for the place that it asked for.
 * False: it is none, or stands for nothing any more. */
bool flow_request(const struct sockaddr *address, uint32_t protocol, uint8_t frame[OPEN_SIZE]);
