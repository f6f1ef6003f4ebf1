#include "network/udp.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "core/loop.h"

struct udp {
    struct session *session;
    struct watch watch;
    bool readable;
    uint8_t *rest; /* of a frame that is partly sent; no other begins until it is out; NULL: none */
    size_t rest_at, rest_size;
};

static bool from_host(struct session *session, uint8_t stream, const uint8_t *bytes, size_t size) {
    struct udp *udp = session->state;
    if (stream || size > MAX_DATAGRAM) return false;
    /* Try twice: an error may be that of an earlier datagram. */
    for (int tries = 0; tries < 2; tries++)
        if (send(udp->watch.fd, bytes, size, MSG_NOSIGNAL) >= 0 || errno == EAGAIN) break;
    return true;
}

static size_t put(struct session *session, const uint8_t *bytes, size_t size) {
    const struct carrier *carrier = session->conn->carrier;
    uint8_t *at;
    size = smaller(size, carrier->reserve(session->conn, &at));
    if (!size) return 0;
    memcpy(at, bytes, size);
    carrier->commit(session->conn, size);
    return size;
}

static bool put_rest(struct session *session) {
    struct udp *udp = session->state;
    size_t size = put(session, udp->rest + udp->rest_at, udp->rest_size);
    udp->rest_at += size;
    udp->rest_size -= size;
    if (!udp->rest_size) {
        free(udp->rest);
        udp->rest = NULL;
    }
    return size;
}

static bool produce(struct session *session) {
    static uint8_t frame[FRAME_HEADER + MAX_DATA];
    struct udp *udp = session->state;
    if (udp->rest) return put_rest(session);
    if (!udp->readable) return false;
    uint8_t *at;
    if (!session->conn->carrier->reserve(session->conn, &at)) return false;
    ssize_t got = recv(udp->watch.fd, frame + FRAME_HEADER, MAX_DATA, 0);
    if (got < 0) {
        /* Go on after an error: it is that of a datagram that was sent, and that nobody took. */
        if (errno == EAGAIN) udp->readable = false;
        return udp->readable;
    }
    size_t size = FRAME_HEADER + (size_t)got;
    write_header(frame, (uint32_t)got, DATA, 0);
    size_t sent = put(session, frame, size);
    if (sent == size) return true;
    udp->rest_at = 0;
    udp->rest_size = size - sent;
    udp->rest = must_alloc(udp->rest_size);
    memcpy(udp->rest, frame + sent, udp->rest_size);
    return true;
}

static void gone(struct session *session) {
    struct udp *udp = session->state;
    watch_drop(&udp->watch);
    free_later(udp->rest);
    free_later(udp);
}

static void socket_ready(struct watch *watch, uint32_t events) {
    struct udp *udp = CONTAINER(watch, struct udp, watch);
    (void)events;
    udp->readable = true;
    session_wake(udp->session);
}

static const struct action udp_action = {
    .datagram = from_host,
    .produce = produce,
    .gone = gone,
};

void udp_start(struct session *session, int socket_fd) {
    struct udp *udp = must_alloc(sizeof *udp);
    udp->session = session;
    session->state = udp;
    session->action = &udp_action;
    watch_add(&udp->watch, socket_fd, EPOLLIN, socket_ready);
}
