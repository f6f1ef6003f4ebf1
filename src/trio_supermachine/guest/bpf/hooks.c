/* Hooks of the root cgroup. A destination that a program names becomes a flow address, where the
 * agent listens; no program ever sees one. Each section is one hook; network/hooks.c attaches them.
 *
 * The same destination always has the same id, which is a hash of it, so no table leads from
 * destinations to ids; the one map leads back. */

#include <stdbool.h>
#include <stdint.h>

#include "bpf/flow.h"

#define PROGRAM(name) __attribute__((section("hook." #name), used)) int name
#define INLINE static inline __attribute__((always_inline))

#define PROBES 3 /* ids that a destination may have: others may have the first ones */
#define NO_ID (~0u)
#define TCP 6
#define UDP 17
#define MPTCP 262     /* sockets have it as their name; they connect as TCP does */
#define ONLY_IF_NEW 1 /* BPF_NOEXIST */

#define htons(value) __builtin_bswap16(value)
#define htonl(value) __builtin_bswap32(value)

/* struct bpf_sock and struct bpf_sock_addr of linux/bpf.h, as far as they are used here. */
struct socket {
    uint32_t bound_device, family, type, protocol, mark, priority;
    uint32_t source_ip4, source_ip6[4], source_port;
    uint16_t destination_port, zero;
    uint32_t destination_ip4, destination_ip6[4];
};

struct context {
    uint32_t user_family, user_ip4, user_ip6[4], user_port;
    uint32_t family, type, protocol;
    uint32_t source_ip4, source_ip6[4];
    const struct socket *socket __attribute__((aligned(8)));
};

/* The loader puts the map's descriptor in the place of this address. */
extern char destinations;

static void *(*const lookup)(void *map, const void *key) = (void *)1;
static long (*const update)(void *map, const void *key, const void *value,
                            uint64_t flags) = (void *)2;
static uint64_t (*const netns_cookie)(volatile void *context) = (void *)122;

/* Say whether a hook is to act: on TCP and UDP, in the agent's network namespace. Another one has a
 * loopback of its own, and a program that was put into it to be cut off stays so. */
INLINE bool is_ours(volatile struct context *context) {
    uint32_t protocol = context->protocol;
    return (protocol == TCP || protocol == UDP || protocol == MPTCP) &&
           netns_cookie(context) == netns_cookie(0);
}

INLINE uint32_t mix(uint32_t hash, uint32_t word) {
    hash = (hash ^ word) * 0x9e3779b1u;
    return hash ^ hash >> 15;
}

/* Compare without branches: the kernel's verifier walks all ways through a hook. */
INLINE bool is_same(const struct destination *a, const struct destination *b) {
    uint32_t difference = (a->address[0] ^ b->address[0]) | (a->address[1] ^ b->address[1]) |
                          (a->address[2] ^ b->address[2]) | (a->address[3] ^ b->address[3]);
    return !(difference | (uint32_t)(a->port ^ b->port));
}

INLINE uint32_t id_of(const struct destination *wanted) {
    uint32_t hash = mix(0, wanted->address[0]);
    hash = mix(hash, wanted->address[1]);
    hash = mix(hash, wanted->address[2]);
    hash = mix(hash, wanted->address[3]);
    hash = mix(hash, wanted->port);
#pragma clang loop unroll(disable)
    for (int probe = 0; probe < PROBES; probe++) {
        uint32_t id = (hash >> (32 - FLOW_ID_BITS)) & FLOW_ID_MASK;
        const struct destination *known = lookup(&destinations, &id);
        if (!known) {
            if (!update(&destinations, &id, wanted, ONLY_IF_NEW)) return id;
            known = lookup(&destinations, &id); /* another CPU was faster */
        }
        if (known && is_same(known, wanted)) return id;
        hash = mix(hash, hash);
    }
    return NO_ID;
}

/* --- addresses, in the host's order --- */

/* Say whether an address is the machine's own, or not one of a single machine. */
INLINE bool stays_inside4(uint32_t ip) {
    return !ip || ip >> 24 == 127 || ip == OWN_IP4 || ip >= 0xe0000000u;
}

INLINE bool is_mapped(uint32_t a, uint32_t b, uint32_t c) { return !a && !b && c == 0xffff; }

INLINE bool is_flow4(uint32_t ip) { return (ip & ~FLOW_ID_MASK) == FLOW_IP4; }

INLINE bool is_flow6(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return a == FLOW_IP6_0 && b == FLOW_IP6_1 && !c && !(d & ~FLOW_ID_MASK);
}

INLINE bool stays_inside6(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    if (!a && !b && !c && d <= 1) return true;                  /* :: and ::1 */
    if (a >> 24 == 0xff || a >> 22 == 0xfe80 >> 6) return true; /* multicast, link-local */
    return (a == FLOW_IP6_0 && !b && !c && d == OWN_IP6_LAST) || is_flow6(a, b, c, d);
}

/* --- on the way out: connect and sendmsg --- */

PROGRAM(to_flow4)(volatile struct context *context) {
    uint32_t ip = context->user_ip4;
    if (!is_ours(context) || stays_inside4(htonl(ip))) return 1;
    struct destination wanted = {{0, 0, htonl(0xffff), ip}, (uint16_t)context->user_port, 0};
    uint32_t id = id_of(&wanted);
    if (id == NO_ID) return 0;
    context->user_ip4 = htonl(FLOW_IP4 | id);
    context->user_port = htons(FLOW_PORT);
    return 1;
}

PROGRAM(to_flow6)(volatile struct context *context) {
    struct destination wanted = {
        {context->user_ip6[0], context->user_ip6[1], context->user_ip6[2], context->user_ip6[3]},
        (uint16_t)context->user_port,
        0,
    };
    uint32_t a = htonl(wanted.address[0]), b = htonl(wanted.address[1]);
    uint32_t c = htonl(wanted.address[2]), d = htonl(wanted.address[3]);
    bool mapped = is_mapped(a, b, c);
    if (!is_ours(context) || (mapped ? stays_inside4(d) : stays_inside6(a, b, c, d))) return 1;
    uint32_t id = id_of(&wanted);
    if (id == NO_ID) return 0;
    if (mapped) {
        context->user_ip6[3] = htonl(FLOW_IP4 | id);
    } else {
        context->user_ip6[0] = htonl(FLOW_IP6_0);
        context->user_ip6[1] = htonl(FLOW_IP6_1);
        context->user_ip6[2] = 0;
        context->user_ip6[3] = htonl(id);
    }
    context->user_port = htons(FLOW_PORT);
    return 1;
}

/* --- on the way back: recvmsg and getpeername --- */

INLINE const struct destination *destination_of(volatile struct context *context, uint32_t id) {
    if (context->user_port != htons(FLOW_PORT) || !is_ours(context)) return 0;
    return lookup(&destinations, &id);
}

PROGRAM(from_flow4)(volatile struct context *context) {
    uint32_t ip = htonl(context->user_ip4);
    if (!is_flow4(ip)) return 1;
    const struct destination *known = destination_of(context, ip & FLOW_ID_MASK);
    if (!known || known->address[2] != htonl(0xffff)) return 1;
    context->user_ip4 = known->address[3];
    context->user_port = known->port;
    return 1;
}

PROGRAM(from_flow6)(volatile struct context *context) {
    uint32_t a = htonl(context->user_ip6[0]), b = htonl(context->user_ip6[1]);
    uint32_t c = htonl(context->user_ip6[2]), d = htonl(context->user_ip6[3]);
    if (!(is_mapped(a, b, c) && is_flow4(d)) && !is_flow6(a, b, c, d)) return 1;
    const struct destination *known = destination_of(context, d & FLOW_ID_MASK);
    if (!known) return 1;
    context->user_ip6[0] = known->address[0];
    context->user_ip6[1] = known->address[1];
    context->user_ip6[2] = known->address[2];
    context->user_ip6[3] = known->address[3];
    context->user_port = known->port;
    return 1;
}

/* --- getsockname: a socket that leads out has one of the addresses that programs see --- */

PROGRAM(own_address4)(volatile struct context *context) {
    const struct socket *socket = context->socket;
    if (socket->destination_port != htons(FLOW_PORT) || !is_ours(context)) return 1;
    if (is_flow4(htonl(socket->destination_ip4))) context->user_ip4 = htonl(OWN_IP4);
    return 1;
}

PROGRAM(own_address6)(volatile struct context *context) {
    const struct socket *socket = context->socket;
    if (socket->destination_port != htons(FLOW_PORT) || !is_ours(context)) return 1;
    uint32_t a = htonl(socket->destination_ip6[0]), b = htonl(socket->destination_ip6[1]);
    uint32_t c = htonl(socket->destination_ip6[2]), d = htonl(socket->destination_ip6[3]);
    if (is_mapped(a, b, c) && is_flow4(d)) {
        context->user_ip6[0] = context->user_ip6[1] = 0;
        context->user_ip6[2] = htonl(0xffff);
        context->user_ip6[3] = htonl(OWN_IP4);
    } else if (is_flow6(a, b, c, d)) {
        context->user_ip6[0] = htonl(FLOW_IP6_0);
        context->user_ip6[1] = context->user_ip6[2] = 0;
        context->user_ip6[3] = htonl(OWN_IP6_LAST);
    }
    return 1;
}
