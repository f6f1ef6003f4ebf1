#include "network/udp.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "core/loop.h"

struct datagrams {
    struct session *session;
    struct watch watch;
    bool readable;
    uint8_t *rest; /* of a frame of which a part has been sent; until it is out, no other begins */
    size_t rest_at, rest_size;
};

static bool no_frame(struct session *session, enum frame_type type, uint8_t stream,
                     struct reader *payload) {
    (void)session, (void)type, (void)stream, (void)payload;
    return false;
}

static bool from_host(struct session *session, uint8_t stream, const uint8_t *bytes, size_t size) {
    struct datagrams *datagrams = session->state;
    if (stream || size > MAX_DATAGRAM) return false;
    /* The error of an earlier one is told first, and is not this one's. */
    for (int tries = 0; tries < 2; tries++)
        if (send(datagrams->watch.fd, bytes, size, MSG_NOSIGNAL) >= 0 || errno == EAGAIN) break;
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
    struct datagrams *datagrams = session->state;
    size_t size = put(session, datagrams->rest + datagrams->rest_at, datagrams->rest_size);
    datagrams->rest_at += size;
    datagrams->rest_size -= size;
    if (!datagrams->rest_size) {
        free(datagrams->rest);
        datagrams->rest = NULL;
    }
    return size;
}

static bool produce(struct session *session) {
    static uint8_t frame[FRAME_HEADER + MAX_DATA];
    struct datagrams *datagrams = session->state;
    if (datagrams->rest) return put_rest(session);
    if (!datagrams->readable) return false;
    uint8_t *at;
    if (!session->conn->carrier->reserve(session->conn, &at)) return false;
    ssize_t got = recv(datagrams->watch.fd, frame + FRAME_HEADER, MAX_DATA, 0);
    if (got < 0) {
        /* An error is that of a datagram sent: nobody took it. There may be more to receive. */
        if (errno == EAGAIN) datagrams->readable = false;
        return datagrams->readable;
    }
    size_t size = FRAME_HEADER + (size_t)got;
    write_header(frame, (uint32_t)got, DATA, 0);
    size_t sent = put(session, frame, size);
    if (sent == size) return true;
    datagrams->rest_at = 0;
    datagrams->rest_size = size - sent;
    datagrams->rest = must_alloc(datagrams->rest_size);
    memcpy(datagrams->rest, frame + sent, datagrams->rest_size);
    return true;
}

static void gone(struct session *session) {
    struct datagrams *datagrams = session->state;
    watch_drop(&datagrams->watch);
    free_later(datagrams->rest);
    free_later(datagrams);
}

static void socket_ready(struct watch *watch, uint32_t events) {
    struct datagrams *datagrams = CONTAINER(watch, struct datagrams, watch);
    (void)events;
    datagrams->readable = true;
    session_wake(datagrams->session);
}

static const struct action datagrams_action = {
    .frame = no_frame,
    .datagram = from_host,
    .produce = produce,
    .gone = gone,
};

void udp_start(struct session *session, int socket_fd) {
    struct datagrams *datagrams = must_alloc(sizeof *datagrams);
    datagrams->session = session;
    session->state = datagrams;
    session->action = &datagrams_action;
    watch_add(&datagrams->watch, socket_fd, EPOLLIN, socket_ready);
}
