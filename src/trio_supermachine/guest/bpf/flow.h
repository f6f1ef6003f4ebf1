/* Flow addresses: where connections and datagrams of programs go instead of out of the machine. The
 * hooks lead there; the agent listens there (network/egress.h). */
#pragma once

/* Flow addresses are 127.64.0.0/10 and fd73:6d00:0:1::/96. Their last 22 bits are the id of a
 * destination. The agent's sockets are on one port of all of them, above those that Linux gives to
 * clients. */
#define FLOW_PORT 61030
#define FLOW_ID_BITS 22
#define FLOW_ID_MASK ((1u << FLOW_ID_BITS) - 1)
#define FLOW_IP4 0x7f400000u
#define FLOW_IP6_0 0xfd736d00u
#define FLOW_IP6_1 0x00000001u

/* Addresses that programs see as their own: 192.0.0.2 and fd73:6d00::2. */
#define OWN_IP4 0xc0000002u
#define OWN_IP6_LAST 2u

/* Size of the map of destinations. The least recently used goes first. */
#define MAX_DESTINATIONS 8192

/* A destination that an id stands for, in network order; IPv4 as ::ffff:a.b.c.d. */
struct destination {
    unsigned int address[4];
    unsigned short port, zero;
};
