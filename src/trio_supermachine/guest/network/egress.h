/* The way out: connections and datagrams of programs go to the host, which opens the real ones.
 *
 * Theory of operation
 *
 * The machine has no network device but loopback. Four parts make an outside of that:
 *
 *  1. Hooks of the kernel (bpf/hooks.c) see each connect and sendmsg of a program. A destination
 *     outside becomes a *flow address* of this machine, whose last 22 bits are an id. One map in
 *     the kernel leads from ids to destinations. Where programs ask for addresses, hooks turn
 *     them back, so that no program sees a flow address.
 *  2. The agent has sockets on one port of all flow addresses (flow_socket): two that listen
 *     (egress.c), two for datagrams (datagrams.c), for IPv4 and IPv6 each.
 *  3. For each accepted TCP connection the agent dials the host, sends OPEN with the destination
 *     that the id stands for, and relays (relay.c). OPEN and the program's first bytes go without
 *     waiting; the host's OK is taken away from what comes back.
 *  4. Each pair of a program's UDP address and a flow address is a *flow* with a connection of its
 *     own to the host (datagrams.c), on which a frame of DATA is a datagram.
 *
 * The host decides what may be reached; nothing here is a boundary. A hostile program can dial a
 * flow address itself: it reaches what the id stands for, which it could have asked for by name, or
 * is reset. It can fill the map: the least recently used ids go first, and connections to them that
 * are not accepted yet are reset. root can detach the hooks: it is cut off by that, and no more.
 *
 * Bounds: MAX_DIALS dials whose OPEN is not out, MAX_RELAYS relays, and in datagrams.c MAX_FLOWS
 * flows. Beyond these nothing is accepted, and connections wait in the backlog of the kernel; when
 * one of them is over, all sockets are looked at again. Since sockets are edge-triggered, whoever
 * stops short of EAGAIN either sets `waiting` or calls flow_socket_again.
 *
 * A relay owns the program's socket; the carrier owns the line. When one side has gone, the other
 * is reset, so that neither program nor host takes a half for the whole. A hostile host can answer
 * anything but OK, end at any moment, and never read: the program sees a reset or waits. */
#pragma once

#include <sys/socket.h>

#include "core/conn.h"
#include "core/loop.h"
#include "core/wire.h"

/* Size of OPEN, the first frame of a connection to the host for the outside. */
#define OPEN_SIZE (FRAME_HEADER + 24u)

/* Accept connections of programs on the flow addresses. False, with errno: that cannot be. */
bool egress_open(const struct carrier *carrier, bool ip6);

/* Open a socket on the flow addresses of one family, and watch it. -1 with errno. */
int flow_socket(struct watch *watch, int family, int type,
                void (*ready)(struct watch *watch, uint32_t events));

/* Look at such a socket again, which has not been used up. */
void flow_socket_again(struct watch *watch);

/* Dial the host. NULL: that cannot be now. The caller calls egress_dialled once for each, when its
 * OPEN is out or never will be. */
struct conn *egress_dial(void);
void egress_dialled(void);

/* Say whether the host may be dialled. If not, all sockets are looked at again when it may. */
bool egress_may_dial(void);

/* Make the OPEN frame for a flow address. False: it is none, or stands for nothing (any more). */
bool flow_request(const struct sockaddr *address, uint32_t protocol, uint8_t frame[OPEN_SIZE]);
