/* Where programs' connections and datagrams go instead of out of the machine: shared by the agent
 * and by the hooks of bpf/, which lead there. docs/reference/wire.rst has the other end. */
#pragma once

/* 127.64.0.0/10 and fd73:6d00:0:1::/96 are flow addresses: their last 22 bits are the id of a
 * destination. The agent's sockets are on one port of all of them, above Linux's ephemeral ones. */
#define FLOW_PORT 61030
#define FLOW_ID_BITS 22
#define FLOW_ID_MASK ((1u << FLOW_ID_BITS) - 1)
#define FLOW_IP4 0x7f400000u
#define FLOW_IP6_0 0xfd736d00u
#define FLOW_IP6_1 0x00000001u

/* The guest's own: 192.0.0.2 and fd73:6d00::2. */
#define OWN_IP4 0xc0000002u
#define OWN_IP6_LAST 2u

/* As many destinations as programs can talk to at once; the least recently used goes first. */
#define MAX_DESTINATIONS 8192

/* What an id stands for, in network order; IPv4 as ::ffff:a.b.c.d. */
struct destination {
    unsigned int address[4];
    unsigned short port, zero;
};
