#include "network/egress.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <unistd.h>

#include "network/hooks.h"
#include "network/listeners.h"
#include "network/relay.h"

#define BACKLOG 1024
#define ACCEPTS_PER_TURN 16
#define SOCKETS 4
#define MAX_RELAYS 1024u
#define MAX_DIALS 32u /* the host's backlog is short, and it refuses what is beyond */

static const struct carrier *carrier;
static struct watch listeners[2] = {{.fd = -1}, {.fd = -1}};
static struct watch *sockets[SOCKETS];
static unsigned socket_count, relays, dials;
static bool waiting; /* for a dial or a relay to be over: then look at all sockets again */

/* --- the sockets --- */

int flow_socket(struct watch *watch, int family, int type,
                void (*ready)(struct watch *watch, uint32_t events)) {
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(FLOW_PORT)};
    struct sockaddr_in address4 = {.sin_family = AF_INET, .sin_port = htons(FLOW_PORT)};
    bool ip6 = family == AF_INET6;
    int fd = socket(family, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), yes = 1;
    if (fd < 0) return -1;
    listeners_own(fd); /* no program listens here */
    watch_add(watch, fd, EPOLLIN, ready);
    sockets[socket_count++] = watch;
    if (ip6 && setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &yes, sizeof yes)) return -1;
    if (ip6 ? bind(fd, (struct sockaddr *)&address, sizeof address)
            : bind(fd, (struct sockaddr *)&address4, sizeof address4))
        return -1;
    return fd;
}

void flow_socket_again(struct watch *watch) {
    watch_change(watch, EPOLLIN); /* tells of what is there already */
}

/* --- dialling --- */

bool egress_may_dial(void) {
    waiting |= dials == MAX_DIALS;
    return dials < MAX_DIALS;
}

static bool may_relay(void) {
    waiting |= relays == MAX_RELAYS;
    return relays < MAX_RELAYS && egress_may_dial();
}

static void wait_no_more(void) {
    if (!waiting) return;
    waiting = false;
    for (unsigned i = 0; i < socket_count; i++) flow_socket_again(sockets[i]);
}

struct conn *egress_dial(void) {
    struct conn *conn = carrier->dial(EGRESS_PORT);
    if (conn) dials++;
    return conn;
}

void egress_dialled(void) {
    dials--;
    wait_no_more();
}

static void relay_over(void) {
    relays--;
    wait_no_more();
}

static const struct relay_owner relay_owner = {.begun = egress_dialled, .over = relay_over};

/* --- flow addresses --- */

static bool flow_id(const struct sockaddr *address, uint32_t *id) {
    uint32_t words[4] = {0};
    if (address->sa_family == AF_INET) {
        uint32_t ip = ntohl(((const struct sockaddr_in *)address)->sin_addr.s_addr);
        *id = ip & FLOW_ID_MASK;
        return (ip & ~FLOW_ID_MASK) == FLOW_IP4;
    }
    memcpy(words, &((const struct sockaddr_in6 *)address)->sin6_addr, sizeof words);
    *id = ntohl(words[3]) & FLOW_ID_MASK;
    return words[0] == htonl(FLOW_IP6_0) && words[1] == htonl(FLOW_IP6_1) && !words[2] &&
           ntohl(words[3]) == *id;
}

bool flow_request(const struct sockaddr *address, uint32_t protocol, uint8_t frame[OPEN_SIZE]) {
    struct destination destination;
    uint32_t id;
    if (!flow_id(address, &id) || !destination_find(id, &destination)) return false;
    struct writer writer = {frame + FRAME_HEADER};
    write_header(frame, OPEN_SIZE - FRAME_HEADER, OPEN_OUTSIDE, 0);
    write_u32(&writer, protocol);
    write_u32(&writer, ntohs(destination.port));
    memcpy(writer.at, destination.address, sizeof destination.address);
    return true;
}

/* --- connections --- */

/* Reset a program's connection: it reads ECONNRESET. */
static void refuse(int fd) {
    struct linger none = {.l_onoff = 1};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
    close(fd);
}

static void lead_out(int fd) {
    struct sockaddr_storage address;
    socklen_t size = sizeof address;
    uint8_t frame[OPEN_SIZE];
    struct conn *conn = NULL;
    if (!getsockname(fd, (struct sockaddr *)&address, &size) &&
        flow_request((struct sockaddr *)&address, IPPROTO_TCP, frame))
        conn = egress_dial();
    if (!conn) {
        refuse(fd);
        return;
    }
    relays++;
    relay_start(conn, fd, frame, sizeof frame, true, &relay_owner);
}

static void acceptable(struct watch *watch, uint32_t events) {
    (void)events;
    for (int accepted = 0; accepted < ACCEPTS_PER_TURN; accepted++) {
        if (!may_relay()) return;
        int fd = accept4(watch->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0) {
            lead_out(fd);
        } else if (errno != ECONNABORTED && errno != EINTR) {
            waiting |=
                errno != EAGAIN; /* the kernel lacks something, and no event tells when not */
            return;
        }
    }
    flow_socket_again(watch);
}

static bool listen_on(struct watch *watch, int family) {
    int fd = flow_socket(watch, family, SOCK_STREAM, acceptable);
    return fd >= 0 && !listen(fd, BACKLOG);
}

bool egress_open(const struct carrier *host, bool ip6) {
    carrier = host;
    return listen_on(&listeners[0], AF_INET) && (!ip6 || listen_on(&listeners[1], AF_INET6));
}
