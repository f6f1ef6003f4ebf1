#include "core/session.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/loop.h"

static const struct action *(*action_of)(enum frame_type type);

static size_t queue_free(const struct session *session) { return QUEUE_SIZE - session->queue_size; }

static void let_action_go(struct session *session) {
    const struct action *action = session->action;
    session->action = NULL;
    if (action && action->gone) action->gone(session);
}

static void release(struct session *session) {
    let_action_go(session);
    session->conn->owner = NULL;
    free_later(session->payload);
    session->payload = NULL;
    free_later(session);
}

static void gone(struct conn *conn) { release(conn->owner); }

/* Reset the connection: a frame has broken the protocol. */
static void break_off(struct session *session) {
    struct conn *conn = session->conn;
    release(session);
    conn->carrier->reset(conn);
}

/* --- taking in --- */

static bool known(const struct session *session) {
    enum frame_type type = session->header[4];
    if (session->header[6] || session->header[7]) return false;
    if (session->payload_left > (type == DATA ? MAX_DATA : MAX_FRAME)) return false;
    return session->action || (type != DATA && action_of(type));
}

static bool is_in_pieces(const struct session *session) {
    return session->header[4] == DATA && !session->action->datagram;
}

static bool begin_frame(struct session *session) {
    uint32_t length;
    memcpy(&length, session->header, sizeof length);
    session->payload_left = session->payload_size = length;
    if (!known(session)) return false;
    if (is_in_pieces(session)) return true;
    session->payload = malloc(length + 1u);
    return session->payload != NULL;
}

static bool end_frame(struct session *session) {
    enum frame_type type = session->header[4];
    session->header_size = 0;
    if (is_in_pieces(session)) return true;
    struct reader reader = {.at = session->payload, .left = session->payload_size};
    if (!session->action) session->action = action_of(type);
    const struct action *action = session->action;
    bool sound = type == DATA
                     ? action->datagram(session, session->header[5], reader.at, reader.left)
                     : action->frame && action->frame(session, type, session->header[5], &reader);
    free(session->payload);
    session->payload = NULL;
    return sound;
}

static bool take_payload(struct session *session, const uint8_t *bytes, size_t size) {
    size_t at = session->payload_size - session->payload_left;
    session->payload_left -= size;
    if (is_in_pieces(session))
        return !size || (session->action->data &&
                         session->action->data(session, session->header[5], bytes, size));
    memcpy(session->payload + at, bytes, size);
    return true;
}

/* Take in one part of a frame. Returns how much was used; 0: the session is no more. */
static size_t take_part(struct session *session, const uint8_t *bytes, size_t size) {
    size_t used;
    bool sound = true;
    if (session->header_size < FRAME_HEADER) {
        used = smaller(FRAME_HEADER - session->header_size, size);
        memcpy(session->header + session->header_size, bytes, used);
        session->header_size += used;
        if (session->header_size < FRAME_HEADER) return used;
        sound = begin_frame(session);
    } else {
        used = smaller(session->payload_left, size);
        sound = take_payload(session, bytes, used);
    }
    if (sound && !session->finishing && !session->payload_left) sound = end_frame(session);
    if (sound) return used;
    break_off(session);
    return 0;
}

static size_t input(struct conn *conn, const uint8_t *bytes, size_t size) {
    struct session *session = conn->owner;
    size_t used = 0;
    while (used < size && conn->owner) {
        if (session->finishing) return size; /* thrown away: the answer is on its way */
        if (session->held) return used;
        if (queue_free(session) < ROOM_FOR_ANSWERS) {
            session->stalled = true;
            return used;
        }
        size_t part = take_part(session, bytes + used, size - used);
        if (!part) return size;
        used += part;
    }
    return used;
}

/* --- sending --- */

static bool send_queue(struct session *session) {
    uint8_t *at;
    size_t room = session->conn->carrier->reserve(session->conn, &at);
    size_t size = smaller(room, session->queue_size);
    if (!size) return false;
    memcpy(at, session->queue + session->queue_at, size);
    session->conn->carrier->commit(session->conn, size);
    session->queue_at += size;
    session->queue_size -= size;
    if (!session->queue_size) session->queue_at = 0;
    return true;
}

static bool pump(struct conn *conn) {
    struct session *session = conn->owner;
    if (session->queue_size) {
        if (!send_queue(session)) return false;
        if (session->stalled && queue_free(session) >= ROOM_FOR_ANSWERS) {
            session->stalled = false;
            conn->carrier->resume(conn);
        }
        return conn->owner != NULL;
    }
    if (session->finishing) {
        release(session);
        conn->carrier->finish(conn);
        return false;
    }
    return session->action && session->action->produce && session->action->produce(session);
}

void session_send(struct session *session, enum frame_type type, uint8_t stream,
                  const void *payload, size_t size) {
    if (queue_free(session) < FRAME_HEADER + size) die("a session's answers exceed its queue");
    if (session->queue_at + session->queue_size + FRAME_HEADER + size > QUEUE_SIZE) {
        memmove(session->queue, session->queue + session->queue_at, session->queue_size);
        session->queue_at = 0;
    }
    uint8_t *at = session->queue + session->queue_at + session->queue_size;
    write_header(at, (uint32_t)size, type, stream);
    if (size) memcpy(at + FRAME_HEADER, payload, size);
    session->queue_size += FRAME_HEADER + size;
    session_wake(session);
}

void session_send_u32(struct session *session, enum frame_type type, uint8_t stream,
                      uint32_t value) {
    session_send(session, type, stream, &value, sizeof value);
}

void session_send_ok(struct session *session, uint64_t value) {
    session_send(session, OK, 0, &value, sizeof value);
}

void session_fail(struct session *session, int error, uint64_t value, const char *format, ...) {
    char message[512];
    uint8_t payload[sizeof message + 16];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    struct writer writer = {payload};
    write_u32(&writer, (uint32_t)error);
    write_string(&writer, message);
    write_u64(&writer, value);
    session_send(session, ERROR, 0, payload, (size_t)(writer.at - payload));
    session_finish(session);
}

size_t session_room(struct session *session, uint8_t **at) {
    size_t room = session->conn->carrier->reserve(session->conn, at);
    if (room <= FRAME_HEADER) return 0;
    *at += FRAME_HEADER;
    /* With its header this fills one packet of AF_VSOCK; a few bytes more would need another. */
    return smaller(room - FRAME_HEADER, MAX_DATA - FRAME_HEADER);
}

void session_send_data(struct session *session, uint8_t stream, size_t size) {
    uint8_t *at;
    session->conn->carrier->reserve(session->conn, &at);
    write_header(at, (uint32_t)size, DATA, stream);
    session->conn->carrier->commit(session->conn, FRAME_HEADER + size);
}

void session_wake(struct session *session) { conn_queue(session->conn); }

void session_finish(struct session *session) {
    session->finishing = true;
    let_action_go(session);
    session_wake(session);
}

void session_hold(struct session *session) { session->held = true; }

void session_unhold(struct session *session) {
    session->held = false;
    session->conn->carrier->resume(session->conn);
}

struct conn *session_leave(struct session *session) {
    struct conn *conn = session->conn;
    release(session);
    conn->user = NULL;
    return conn;
}

uint8_t *session_take_payload(struct session *session) {
    uint8_t *payload = session->payload;
    session->payload = NULL;
    return payload;
}

/* --- beginning --- */

static const struct conn_user session_user = {.input = input, .pump = pump, .gone = gone};

void session_open(struct conn *conn, const struct action *action) {
    struct session *session = must_alloc(sizeof *session);
    session->conn = conn;
    session->action = action;
    conn->user = &session_user;
    conn->owner = session;
}

void session_accept(struct conn *conn) { session_open(conn, NULL); }

void sessions_serve(const struct action *(*of)(enum frame_type)) { action_of = of; }
