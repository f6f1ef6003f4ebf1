#include "network/datagrams.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/in6.h> /* IPV6_FREEBIND */
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/loop.h"
#include "network/egress.h"

#define MAX_FLOWS 256u
#define MAX_QUEUED 131072u /* bytes of a flow, to the host */
#define SILENCE_S 60u
#define RECEIVED_PER_TURN 32
#define MAX_ANSWER 1024u /* bytes of OK or ERROR */

struct queued {
    struct queued *next;
    size_t at, size;
    uint8_t bytes[];
};

union address {
    struct sockaddr any;
    struct sockaddr_in ip4;
    struct sockaddr_in6 ip6;
};

struct flow {
    struct flow *newer, *older; /* by use */
    uint64_t used_ns;
    struct conn *conn;
    int socket_fd;
    union address program, outside; /* the latter is a flow address */
    struct queued *first, **last;   /* to the host */
    size_t queued_size;
    bool begun; /* its OPEN is out */
    bool answered;
    uint8_t header[FRAME_HEADER]; /* of the host's frame that is being taken in */
    size_t header_size, payload_at;
    uint8_t *payload; /* of that frame, if it comes in parts; NULL: none yet */
};

static struct watch sockets[2] = {{.fd = -1}, {.fd = -1}};
static struct flow *newest, *oldest;
static unsigned flows;
static struct timer silence;
static uint8_t buffer[65536];

/* --- flows --- */

static void unlink_flow(struct flow *flow) {
    if (flow->newer) flow->newer->older = flow->older;
    else newest = flow->older;
    if (flow->older) flow->older->newer = flow->newer;
    else oldest = flow->newer;
}

static void link_newest(struct flow *flow) {
    flow->newer = NULL;
    flow->older = newest;
    if (newest) newest->newer = flow;
    else oldest = flow;
    newest = flow;
}

static void begin(struct flow *flow) {
    if (!flow->begun) egress_dialled();
    flow->begun = true;
}

static void touch(struct flow *flow) {
    flow->used_ns = now_ns();
    unlink_flow(flow);
    link_newest(flow);
}

/* Free a flow, whose connection has gone, or is ended by the caller. */
static void release(struct flow *flow) {
    begin(flow);
    unlink_flow(flow);
    flows--;
    for (struct queued *queued = flow->first, *next; queued; queued = next) {
        next = queued->next;
        free(queued);
    }
    free(flow->payload);
    free_later(flow);
    if (!flows) timer_clear(&silence);
}

static void end_flow(struct flow *flow) {
    struct conn *conn = flow->conn;
    bool answered = flow->answered;
    release(flow);
    if (answered) conn->carrier->finish(conn);
    else conn->carrier->reset(conn);
}

static void end_silent(struct timer *timer) {
    uint64_t now = now_ns();
    while (oldest && oldest->used_ns + SILENCE_S * NS_PER_S <= now) end_flow(oldest);
    if (oldest) timer_set(timer, oldest->used_ns + SILENCE_S * NS_PER_S, end_silent);
}

/* End the least recently used flow that the host has answered, if there are too many. False: there
 * is none. */
static bool make_room(void) {
    struct flow *flow = oldest;
    if (flows < MAX_FLOWS) return true;
    while (flow && !flow->answered) flow = flow->newer;
    if (flow) end_flow(flow);
    return flow;
}

static bool is_same(const union address *a, const union address *b) {
    if (a->any.sa_family != b->any.sa_family) return false;
    if (a->any.sa_family == AF_INET)
        return a->ip4.sin_addr.s_addr == b->ip4.sin_addr.s_addr &&
               a->ip4.sin_port == b->ip4.sin_port;
    return !memcmp(&a->ip6.sin6_addr, &b->ip6.sin6_addr, sizeof a->ip6.sin6_addr) &&
           a->ip6.sin6_port == b->ip6.sin6_port;
}

/* --- from the host --- */

static void deliver(const struct flow *flow, const uint8_t *bytes, size_t size) {
    union {
        struct cmsghdr header; /* for its alignment */
        uint8_t room[CMSG_SPACE(sizeof(struct in6_pktinfo))];
    } control = {0};
    bool ip6 = flow->program.any.sa_family == AF_INET6;
    struct iovec part = {(void *)bytes, size};
    struct msghdr message = {
        .msg_name = (void *)&flow->program,
        .msg_namelen = ip6 ? sizeof flow->program.ip6 : sizeof flow->program.ip4,
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen =
            ip6 ? CMSG_SPACE(sizeof(struct in6_pktinfo)) : CMSG_SPACE(sizeof(struct in_pktinfo)),
    };
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (ip6) {
        struct in6_pktinfo from = {.ipi6_addr = flow->outside.ip6.sin6_addr};
        *header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof from),
                                   .cmsg_level = IPPROTO_IPV6,
                                   .cmsg_type = IPV6_PKTINFO};
        memcpy(CMSG_DATA(header), &from, sizeof from);
    } else {
        struct in_pktinfo from = {.ipi_spec_dst = flow->outside.ip4.sin_addr};
        *header = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(sizeof from), .cmsg_level = IPPROTO_IP, .cmsg_type = IP_PKTINFO};
        memcpy(CMSG_DATA(header), &from, sizeof from);
    }
    /* Lose what cannot go now, as datagrams are lost. */
    ssize_t ignored = sendmsg(flow->socket_fd, &message, MSG_NOSIGNAL);
    (void)ignored;
}

/* Read the size of the frame's payload. False: the flow must end. */
static bool take_header(struct flow *flow, size_t *size) {
    uint32_t length;
    enum frame_type type = flow->header[4];
    memcpy(&length, flow->header, sizeof length);
    *size = length;
    if (flow->header[5] || flow->header[6] || flow->header[7]) return false;
    if (!flow->answered) return type == OK && length <= MAX_ANSWER;
    return type == DATA && length <= MAX_DATAGRAM;
}

static void end_frame(struct flow *flow, const uint8_t *payload, size_t size) {
    if (flow->answered) {
        deliver(flow, payload, size);
        touch(flow);
    }
    flow->answered = true;
    flow->header_size = flow->payload_at = 0;
    free(flow->payload);
    flow->payload = NULL;
}

/* Take in one part of a frame. Returns how much was used. `broken`: the flow must end. */
static size_t take_part(struct flow *flow, const uint8_t *bytes, size_t size, bool *broken) {
    size_t used = 0, payload_size;
    if (flow->header_size < FRAME_HEADER) {
        used = smaller(FRAME_HEADER - flow->header_size, size);
        memcpy(flow->header + flow->header_size, bytes, used);
        flow->header_size += used;
        if (flow->header_size < FRAME_HEADER) return used;
    }
    *broken = !take_header(flow, &payload_size);
    if (*broken) return used;
    size_t here = smaller(payload_size - flow->payload_at, size - used);
    if (here == payload_size) { /* it came whole, as most do */
        end_frame(flow, bytes + used, here);
        return used + here;
    }
    if (!flow->payload) flow->payload = must_alloc(payload_size);
    memcpy(flow->payload + flow->payload_at, bytes + used, here);
    flow->payload_at += here;
    if (flow->payload_at == payload_size) end_frame(flow, flow->payload, payload_size);
    return used + here;
}

static size_t input(struct conn *conn, const uint8_t *bytes, size_t size) {
    struct flow *flow = conn->owner;
    bool broken = false;
    for (size_t used = 0; used < size && !broken;)
        used += take_part(flow, bytes + used, size - used, &broken);
    if (broken) end_flow(flow);
    return size;
}

static void gone(struct conn *conn) { release(conn->owner); }

/* --- to the host --- */

static void enqueue(struct flow *flow, const uint8_t *head, size_t head_size, const uint8_t *bytes,
                    size_t size) {
    if (flow->queued_size + head_size + size > MAX_QUEUED) return;
    struct queued *queued = must_alloc(sizeof *queued + head_size + size);
    queued->size = head_size + size;
    memcpy(queued->bytes, head, head_size);
    if (size) memcpy(queued->bytes + head_size, bytes, size);
    flow->queued_size += queued->size;
    *flow->last = queued;
    flow->last = &queued->next;
    conn_queue(flow->conn);
}

static bool pump(struct conn *conn) {
    struct flow *flow = conn->owner;
    struct queued *queued = flow->first;
    uint8_t *at;
    size_t size = queued ? conn->carrier->reserve(conn, &at) : 0;
    if (!size) return false;
    size = smaller(size, queued->size - queued->at);
    memcpy(at, queued->bytes + queued->at, size);
    conn->carrier->commit(conn, size);
    queued->at += size;
    if (queued->at < queued->size) return true;
    flow->first = queued->next;
    if (!flow->first) flow->last = &flow->first;
    flow->queued_size -= queued->size;
    free(queued);
    begin(flow);
    return flow->first;
}

static const struct conn_user flow_user = {.input = input, .pump = pump, .gone = gone};

/* Begin a flow. NULL: that cannot be now. */
static struct flow *open_flow(int fd, const union address *program, const union address *outside) {
    uint8_t frame[OPEN_SIZE];
    if (!flow_request(&outside->any, IPPROTO_UDP, frame) || !make_room()) return NULL;
    struct conn *conn = egress_dial();
    if (!conn) return NULL;
    struct flow *flow = must_alloc(sizeof *flow);
    conn->user = &flow_user;
    conn->owner = flow;
    flow->conn = conn;
    flow->socket_fd = fd;
    flow->program = *program;
    flow->outside = *outside;
    flow->last = &flow->first;
    if (!flows++) timer_set(&silence, now_ns() + SILENCE_S * NS_PER_S, end_silent);
    link_newest(flow);
    enqueue(flow, frame, sizeof frame, NULL, 0);
    return flow;
}

static struct flow *find_flow(const union address *program, const union address *outside) {
    for (struct flow *flow = newest; flow; flow = flow->older)
        if (is_same(&flow->program, program) && is_same(&flow->outside, outside)) return flow;
    return NULL;
}

/* --- from programs --- */

/* Find out where a datagram was sent to, without the port. */
static bool read_outside(struct msghdr *message, union address *outside) {
    struct cmsghdr *header = CMSG_FIRSTHDR(message);
    if (header && header->cmsg_level == IPPROTO_IP && header->cmsg_type == IP_PKTINFO) {
        struct in_pktinfo info;
        memcpy(&info, CMSG_DATA(header), sizeof info);
        outside->ip4 = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr = info.ipi_addr};
        return true;
    }
    if (header && header->cmsg_level == IPPROTO_IPV6 && header->cmsg_type == IPV6_PKTINFO) {
        struct in6_pktinfo info;
        memcpy(&info, CMSG_DATA(header), sizeof info);
        outside->ip6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_addr = info.ipi6_addr};
        return true;
    }
    return false;
}

/* Take one datagram of a program. False: there is none. */
static bool take_datagram(int fd) {
    uint8_t control[256] __attribute__((aligned(_Alignof(struct cmsghdr)))), header[FRAME_HEADER];
    union address program = {0}, outside = {0};
    struct iovec part = {buffer, sizeof buffer};
    struct msghdr message = {
        .msg_name = &program,
        .msg_namelen = sizeof program,
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = control,
        .msg_controllen = sizeof control,
    };
    ssize_t got = recvmsg(fd, &message, 0);
    if (got < 0) return errno == EINTR;
    if (got > (ssize_t)MAX_DATAGRAM || !read_outside(&message, &outside)) return true;
    struct flow *flow = find_flow(&program, &outside);
    if (!flow) flow = open_flow(fd, &program, &outside);
    if (!flow) return true;
    touch(flow);
    write_header(header, (uint32_t)got, DATA, 0);
    enqueue(flow, header, sizeof header, buffer, (size_t)got);
    return true;
}

static void readable(struct watch *watch, uint32_t events) {
    (void)events;
    for (int taken = 0; taken < RECEIVED_PER_TURN; taken++)
        if (!egress_may_dial() || !take_datagram(watch->fd)) return;
    flow_socket_again(watch);
}

static bool open_socket(struct watch *watch, int family) {
    int fd = flow_socket(watch, family, SOCK_DGRAM, readable), yes = 1;
    if (fd < 0) return false;
    if (family == AF_INET) return !setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &yes, sizeof yes);
    /* Allow to send from flow addresses, which are this machine's by a route only. */
    return !setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &yes, sizeof yes) &&
           !setsockopt(fd, IPPROTO_IPV6, IPV6_FREEBIND, &yes, sizeof yes);
}

bool datagrams_open(bool ip6) {
    return open_socket(&sockets[0], AF_INET) && (!ip6 || open_socket(&sockets[1], AF_INET6));
}
