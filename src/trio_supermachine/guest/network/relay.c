#include "network/relay.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/socket.h>

#include "core/loop.h"

#define PROBE_AFTER 20                  /* seconds */
#define ANSWER_SIZE (FRAME_HEADER + 8u) /* of OK with its value */

struct relay {
    struct conn *conn;
    struct watch watch; /* the program's socket */
    bool readable, writable, hung_up;
    bool program_ended; /* the host has been told */
    bool host_ended;    /* the program has been told */
    bool deaf;          /* the program takes nothing; what it has said still goes out */
    uint8_t ahead[MAX_AHEAD];
    size_t ahead_at, ahead_size;
    uint8_t answer[ANSWER_SIZE];
    size_t answer_left;
    const struct relay_owner *owner;
    bool begun;
};

static void begin(struct relay *relay) {
    if (relay->owner && !relay->begun) relay->owner->begun();
    relay->begun = true;
}

/* Free a relay, whose connection has gone, or is ended by the caller. */
static void release(struct relay *relay, bool rudely) {
    struct linger none = {.l_onoff = 1};
    if (rudely) setsockopt(relay->watch.fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
    watch_drop(&relay->watch);
    begin(relay);
    if (relay->owner) relay->owner->over();
    free_later(relay);
}

static void break_off(struct relay *relay) {
    struct conn *conn = relay->conn;
    release(relay, true);
    conn->carrier->reset(conn);
}

static void end_if_both_have(struct relay *relay) {
    struct conn *conn = relay->conn;
    if (!relay->program_ended || !relay->host_ended) return;
    release(relay, false);
    conn->carrier->finish(conn);
}

/* --- to the host --- */

/* Probe a program that has ended sending. One that was killed looks the same until it is sent
 * something. The kernel forgets its socket in a minute (tcp_fin_timeout), and then answers RST. */
static void watch_for_death(int fd) {
    int yes = 1, seconds = PROBE_AFTER;
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &seconds, sizeof seconds);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &seconds, sizeof seconds);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof yes);
}

static bool send_ahead(struct relay *relay) {
    uint8_t *at;
    size_t size = relay->conn->carrier->reserve(relay->conn, &at);
    size = smaller(size, relay->ahead_size - relay->ahead_at);
    if (!size) return false;
    memcpy(at, relay->ahead + relay->ahead_at, size);
    relay->conn->carrier->commit(relay->conn, size);
    relay->ahead_at += size;
    if (relay->ahead_at == relay->ahead_size) begin(relay);
    return true;
}

static bool pump(struct conn *conn) {
    struct relay *relay = conn->owner;
    if (relay->ahead_at < relay->ahead_size) return send_ahead(relay);
    if (!relay->readable || relay->program_ended) return false;
    uint8_t *at;
    size_t room = conn->carrier->reserve(conn, &at);
    if (!room) return false;
    ssize_t got = recv(relay->watch.fd, at, room, 0);
    if (got > 0) {
        conn->carrier->commit(conn, (size_t)got);
        /* Wait for the next event: a socket that gave less is empty. */
        if ((size_t)got < room && !relay->hung_up) relay->readable = false;
        return relay->readable;
    }
    if (got < 0 && errno == EINTR) return true;
    if (got < 0 && errno == EAGAIN) {
        relay->readable = false;
    } else if (got < 0 || relay->deaf) {
        break_off(relay);
    } else {
        relay->program_ended = true;
        watch_for_death(relay->watch.fd);
        conn->carrier->end(conn);
        end_if_both_have(relay);
    }
    return false;
}

/* --- to the program --- */

/* Take OK away from what the host says. Anything else in its place is the end. */
static size_t take_answer(struct relay *relay, const uint8_t *bytes, size_t size) {
    uint8_t expected[FRAME_HEADER];
    size_t used = smaller(size, relay->answer_left), at = ANSWER_SIZE - relay->answer_left;
    memcpy(relay->answer + at, bytes, used);
    relay->answer_left -= used;
    write_header(expected, ANSWER_SIZE - FRAME_HEADER, OK, 0);
    if (!memcmp(relay->answer, expected, smaller(at + used, FRAME_HEADER))) return used;
    break_off(relay);
    return size;
}

/* Give up a program's side that is broken. What it said before still reaches the host, and a reset
 * follows. */
static void become_deaf(struct relay *relay) {
    relay->deaf = relay->readable = true;
    if (relay->program_ended) break_off(relay);
    else conn_queue(relay->conn);
}

static size_t input(struct conn *conn, const uint8_t *bytes, size_t size) {
    struct relay *relay = conn->owner;
    size_t used = relay->answer_left ? take_answer(relay, bytes, size) : 0;
    if (relay->watch.fd < 0) return size;
    while (used < size && relay->writable && !relay->deaf) {
        ssize_t sent = send(relay->watch.fd, bytes + used, size - used, MSG_NOSIGNAL);
        if (sent >= 0) used += (size_t)sent;
        else if (errno == EAGAIN) relay->writable = false;
        else if (errno != EINTR) become_deaf(relay);
    }
    return relay->deaf ? size : used;
}

static void ended(struct conn *conn) {
    struct relay *relay = conn->owner;
    if (relay->answer_left) {
        break_off(relay);
        return;
    }
    relay->host_ended = true;
    shutdown(relay->watch.fd, SHUT_WR);
    end_if_both_have(relay);
}

static void gone(struct conn *conn) { release(conn->owner, !conn->closed); }

static void program_ready(struct watch *watch, uint32_t events) {
    struct relay *relay = CONTAINER(watch, struct relay, watch);
    if (events & ~(uint32_t)(EPOLLIN | EPOLLOUT)) relay->hung_up = true;
    if (events & ~(uint32_t)EPOLLOUT) {
        relay->readable = true;
        conn_queue(relay->conn);
    }
    if (events & ~(uint32_t)(EPOLLIN | EPOLLRDHUP) && !relay->writable) {
        relay->writable = true;
        relay->conn->carrier->resume(relay->conn);
    }
    if (events & EPOLLERR && relay->watch.fd >= 0 && !relay->deaf) become_deaf(relay);
}

static const struct conn_user relay_user = {
    .input = input,
    .pump = pump,
    .ended = ended,
    .gone = gone,
};

void relay_start(struct conn *conn, int socket_fd, const void *ahead, size_t ahead_size,
                 bool answered, const struct relay_owner *owner) {
    struct relay *relay = must_alloc(sizeof *relay);
    if (ahead_size > sizeof relay->ahead) die("too much to be said ahead");
    relay->conn = conn;
    relay->writable = true;
    relay->ahead_size = ahead_size;
    memcpy(relay->ahead, ahead, ahead_size);
    relay->answer_left = answered ? ANSWER_SIZE : 0;
    relay->owner = owner;
    conn->user = &relay_user;
    conn->owner = relay;
    watch_add(&relay->watch, socket_fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP, program_ready);
    conn_queue(conn);
    conn->carrier->resume(conn);
}
