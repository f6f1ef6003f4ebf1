/* One connection's frames: what comes is taken apart and handed to the action that its first
 * frame asks for, what goes out is packed. */
#pragma once

#include "core/conn.h"
#include "core/wire.h"

/* A session sends small frames from a queue of this size. No frame is taken in while less than
 * ROOM_FOR_ANSWERS is free, so that whatever answers it, or happens by itself, fits. */
#define QUEUE_SIZE 2048
#define ROOM_FOR_ANSWERS 1024

struct session;

/* What a connection is for. */
struct action {
    /* A whole frame, other than DATA. False: it breaks the protocol. NULL: any does. */
    bool (*frame)(struct session *session, enum frame_type type, uint8_t stream,
                  struct reader *payload);
    /* Some bytes of DATA, all of which are used. False: they break the protocol. NULL: any do. */
    bool (*data)(struct session *session, uint8_t stream, const uint8_t *bytes, size_t size);
    /* A whole frame of DATA, perhaps empty, in the place of `data`. False: it breaks the protocol.
     */
    bool (*datagram)(struct session *session, uint8_t stream, const uint8_t *bytes, size_t size);
    /* The queue of small frames is empty: send at most one data frame, with session_room and
     * session_send_data. Returns whether there may be more. NULL: never any. */
    bool (*produce)(struct session *session);
    /* The connection has gone, whoever closed it: release what the action holds. */
    void (*gone)(struct session *session);
};

struct session {
    struct conn *conn;
    const struct action *action;
    void *state; /* the action's */
    uint8_t header[FRAME_HEADER];
    size_t header_size;
    uint8_t *payload; /* of the frame being taken in; NULL for DATA in pieces */
    size_t payload_size, payload_left;
    uint8_t queue[QUEUE_SIZE];
    size_t queue_at, queue_size;
    bool finishing, stalled, held;
};

/* A session of this end's own making: the action comes with it. */
void session_open(struct conn *conn, const struct action *action);

/* Keep the payload that is being handled: the caller frees it. */
uint8_t *session_take_payload(struct session *session);

void session_send(struct session *session, enum frame_type type, uint8_t stream,
                  const void *payload, size_t size);
void session_send_u32(struct session *session, enum frame_type type, uint8_t stream,
                      uint32_t value);
void session_send_ok(struct session *session, uint64_t value);

/* ERROR, and the end of the session. */
void session_fail(struct session *session, int error, uint64_t value, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* How many bytes of data could be sent now, and where to put them. */
size_t session_room(struct session *session, uint8_t **at);
void session_send_data(struct session *session, uint8_t stream, size_t size);

/* There is something to produce. */
void session_wake(struct session *session);

/* Close when everything is out. The action is gone at once. */
void session_finish(struct session *session);

/* Take nothing in until it is known whose the bytes are that follow: then session_unhold, or
 * session_leave, which gives the connection to another user. Nothing may wait to be sent by then.
 */
void session_hold(struct session *session);
void session_unhold(struct session *session);
struct conn *session_leave(struct session *session);

/* Take a connection of the host's: its first frame says what for. */
void session_accept(struct conn *conn);

/* Once, at the start: `action_of` says which action a first frame asks for; NULL: none. */
void sessions_serve(const struct action *(*action_of)(enum frame_type type));
