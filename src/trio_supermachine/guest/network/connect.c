#include "network/connect.h"

#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bpf/flow.h"
#include "core/loop.h"
#include "network/listeners.h"
#include "network/relay.h"
#include "network/udp.h"

#define MAX_PLACES 3

/* An attempt to connect: to one place after the other, until one answers. */
struct attempt {
    struct session *session;
    struct watch watch; /* fd -1: none now */
    struct sockaddr_storage places[MAX_PLACES];
    size_t next, count;
    bool looked; /* in the tables, for a place that is not on loopback */
    uint32_t port;
    int error; /* of the first place: this machine may not have the others */
};

static socklen_t size_of(const struct sockaddr_storage *place) {
    return place->ss_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
}

static void add_place(struct attempt *attempt, const struct sockaddr_storage *place) {
    for (size_t i = 0; i < attempt->count; i++)
        if (!memcmp(&attempt->places[i], place, size_of(place))) return;
    attempt->places[attempt->count++] = *place;
}

static void add_loopback(struct attempt *attempt) {
    struct sockaddr_storage place = {0};
    struct sockaddr_in *ip4 = (struct sockaddr_in *)&place;
    ip4->sin_family = AF_INET;
    ip4->sin_port = htons((uint16_t)attempt->port);
    ip4->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    add_place(attempt, &place);
    memset(&place, 0, sizeof place);
    struct sockaddr_in6 *ip6 = (struct sockaddr_in6 *)&place;
    ip6->sin6_family = AF_INET6;
    ip6->sin6_port = htons((uint16_t)attempt->port);
    ip6->sin6_addr = in6addr_loopback;
    add_place(attempt, &place);
}

/* Hand the program's connection to a relay, which says OK to the host first. */
static void succeed(struct attempt *attempt) {
    uint8_t ok[FRAME_HEADER + 8];
    struct writer writer = {ok + FRAME_HEADER};
    write_header(ok, 8, OK, 0);
    write_u64(&writer, attempt->port);
    int fd = watch_release(&attempt->watch);
    relay_start(session_leave(attempt->session), fd, ok, sizeof ok, false, NULL);
}

static void place_ready(struct watch *watch, uint32_t events);

static int begin(struct attempt *attempt, const struct sockaddr_storage *place) {
    int fd = socket(place->ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return errno;
    if (!connect(fd, (const struct sockaddr *)place, size_of(place)) || errno == EINPROGRESS) {
        watch_add(&attempt->watch, fd, EPOLLOUT, place_ready);
        return 0;
    }
    int error = errno;
    close(fd);
    return error;
}

/* Add the place where the port is bound to another of the machine's addresses, if there is one. */
static void look_elsewhere(struct attempt *attempt) {
    struct sockaddr_storage place;
    if (attempt->looked) return;
    attempt->looked = true;
    if (listeners_find(IPPROTO_TCP, &attempt->port, &place)) add_place(attempt, &place);
}

/* Begin to connect to the next place. False: there was none, and the session has failed. */
static bool try_next(struct attempt *attempt) {
    for (;;) {
        if (attempt->next == attempt->count) look_elsewhere(attempt);
        if (attempt->next == attempt->count) break;
        int error = begin(attempt, &attempt->places[attempt->next++]);
        if (!error) return true;
        if (!attempt->error) attempt->error = error;
    }
    session_fail(attempt->session, attempt->error, attempt->port, "port %u: %s", attempt->port,
                 strerror(attempt->error));
    return false;
}

/* Say whether a socket is connected to itself. The kernel may have given it the very port that it
 * was to connect to, if nobody listens there. */
static bool is_its_own_peer(int fd) {
    struct sockaddr_storage own = {0}, peer = {0};
    socklen_t own_size = sizeof own, peer_size = sizeof peer;
    return !getsockname(fd, (struct sockaddr *)&own, &own_size) &&
           !getpeername(fd, (struct sockaddr *)&peer, &peer_size) && own_size == peer_size &&
           !memcmp(&own, &peer, own_size);
}

static void place_ready(struct watch *watch, uint32_t events) {
    struct attempt *attempt = CONTAINER(watch, struct attempt, watch);
    struct session *session = attempt->session;
    int error = 0;
    socklen_t size = sizeof error;
    (void)events;
    getsockopt(watch->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (!error && is_its_own_peer(watch->fd)) error = ECONNREFUSED;
    if (!error) {
        succeed(attempt);
        return;
    }
    watch_drop(watch);
    if (!attempt->error) attempt->error = error;
    if (!try_next(attempt)) session_unhold(session);
}

static void connect_tcp(struct session *session, uint32_t port) {
    struct sockaddr_storage unused;
    /* Look first where the agent's own socket would answer. */
    bool must_look = !port || port == FLOW_PORT;
    if (must_look && !listeners_find(IPPROTO_TCP, &port, &unused)) {
        session_fail(session, ECONNREFUSED, port, "nothing listens");
        return;
    }
    struct attempt *attempt = must_alloc(sizeof *attempt);
    attempt->session = session;
    attempt->watch.fd = -1;
    attempt->port = port;
    session->state = attempt;
    add_loopback(attempt);
    if (try_next(attempt)) session_hold(session);
}

static void connect_udp(struct session *session, uint32_t port) {
    struct sockaddr_storage place;
    int fd = -1;
    errno = ECONNREFUSED;
    if (port && listeners_find(IPPROTO_UDP, &port, &place))
        fd = socket(place.ss_family, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0 && !connect(fd, (struct sockaddr *)&place, size_of(&place))) {
        session_send_ok(session, port);
        udp_start(session, fd);
        return;
    }
    session_fail(session, errno, port, "port %u: %s", port, strerror(errno));
    if (fd >= 0) close(fd);
}

static bool connect_frame(struct session *session, enum frame_type type, uint8_t stream,
                          struct reader *payload) {
    (void)stream;
    uint32_t protocol = read_u32(payload), port = read_u32(payload);
    if (type != CONNECT || session->state || !read_whole(payload) || port > UINT16_MAX)
        return false;
    if (protocol == IPPROTO_TCP) connect_tcp(session, port);
    else if (protocol == IPPROTO_UDP) connect_udp(session, port);
    else return false;
    return true;
}

static void connect_gone(struct session *session) {
    struct attempt *attempt = session->state;
    if (!attempt) return;
    watch_drop(&attempt->watch);
    free_later(attempt);
}

const struct action connect_action = {
    .frame = connect_frame,
    .gone = connect_gone,
};
