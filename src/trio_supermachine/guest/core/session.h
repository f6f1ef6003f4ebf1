/* A session: one connection as a sequence of frames (docs/wire.rst, "Frames").
 *
 * Theory of operation
 *
 * A session takes frames apart as they come and hands them to its *action*: exec, a file, a control
 * call, CONNECT, the lifeline. A connection that the host made has none until its first frame,
 * whose type says which (sessions_serve). A connection that the agent dialled is given its action
 * with session_open. The action keeps its own state in `state`.
 *
 * Life: open -> (held <-> open) -> finishing -> gone.
 *  - open: frames are taken in and answered.
 *  - held (session_hold): nothing is taken in, because it is not known yet whose the bytes are that
 *    follow. CONNECT holds while it connects; then session_leave gives the connection, and the
 *    bytes that wait, to a relay.
 *  - finishing (session_finish, session_fail): the action is gone already; the queue is sent, what
 *    still comes is thrown away, and then the connection is closed.
 *  - gone: released, by the host's close, by a breach of the protocol, or after finishing. The
 *    action hears `gone` exactly once in each of these cases, and must release all that it holds.
 *
 * Order: small frames go through a queue, in the order in which they were sent. DATA goes straight
 * to the carrier, and only when the queue is empty: so DATA never overtakes a small frame that was
 * sent before it, but a small frame may overtake DATA that was not produced yet.
 *
 * Memory: a frame other than DATA is gathered whole, 2 MiB at the most; DATA is handed on in pieces
 * as it comes, unless the action takes datagrams. The queue has a fixed size. While less than
 * ROOM_FOR_ANSWERS of it is free, no frame is taken in: a host that asks and does not read its
 * answers is held back by its own credit. What one frame, timer or process causes to be sent must
 * fit into that room, or the agent dies.
 *
 * A hostile host can send anything. Type, length and the zero bytes of a header are checked before
 * memory is taken for it; each action checks that the payload is used up exactly. What breaks the
 * protocol ends its own connection, by a reset, and nothing else. Programs in the guest cannot
 * reach a session: the carriers take connections of the host alone. */
#pragma once

#include "core/conn.h"
#include "core/wire.h"

#define QUEUE_SIZE 2048
#define ROOM_FOR_ANSWERS 1024

struct session;

/* What a connection is for. All but `gone` are called while the session is open only. */
struct action {
    /* Take a whole frame, other than DATA. False: it breaks the protocol. NULL: any does. */
    bool (*frame)(struct session *session, enum frame_type type, uint8_t stream,
                  struct reader *payload);
    /* Use all of these bytes of DATA. False: they break the protocol. NULL: any do. */
    bool (*data)(struct session *session, uint8_t stream, const uint8_t *bytes, size_t size);
    /* Take a whole frame of DATA, perhaps empty. An action has this or `data`. */
    bool (*datagram)(struct session *session, uint8_t stream, const uint8_t *bytes, size_t size);
    /* Send one frame of data at the most, with session_room and session_send_data. Called when the
     * queue of small frames is empty. Returns whether there may be more. NULL: there never is. */
    bool (*produce)(struct session *session);
    /* Release what the action holds. The connection has gone, whoever closed it. */
    void (*gone)(struct session *session);
};

struct session {
    struct conn *conn;
    const struct action *action; /* NULL: before the first frame, and when it has gone */
    void *state;                 /* the action's */
    uint8_t header[FRAME_HEADER];
    size_t header_size;
    uint8_t *payload; /* of the frame being taken in; NULL for DATA in pieces */
    size_t payload_size, payload_left;
    uint8_t queue[QUEUE_SIZE]; /* of small frames to send */
    size_t queue_at, queue_size;
    bool finishing;
    bool stalled; /* nothing is taken in until the queue has room */
    bool held;
};

/* Say, once and at the start, which action a first frame asks for; NULL: none. */
void sessions_serve(const struct action *(*action_of)(enum frame_type type));

/* Begin a session on a connection that the host made. */
void session_accept(struct conn *conn);

/* Begin a session on a connection that the agent dialled. */
void session_open(struct conn *conn, const struct action *action);

/* Keep the payload that is being handled. The caller frees it. */
uint8_t *session_take_payload(struct session *session);

/* Send a small frame. */
void session_send(struct session *session, enum frame_type type, uint8_t stream,
                  const void *payload, size_t size);
void session_send_u32(struct session *session, enum frame_type type, uint8_t stream,
                      uint32_t value);
void session_send_ok(struct session *session, uint64_t value);

/* Send ERROR, and finish. */
void session_fail(struct session *session, int error, uint64_t value, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* Say how many bytes of data could be sent now, and where to put them. */
size_t session_room(struct session *session, uint8_t **at);

/* Send this many of the bytes put there, as one frame. */
void session_send_data(struct session *session, uint8_t stream, size_t size);

/* Have `produce` called: there may be something. */
void session_wake(struct session *session);

/* Close when everything is out. The action has gone when this returns. */
void session_finish(struct session *session);

/* Take nothing in, until session_unhold or session_leave. */
void session_hold(struct session *session);
void session_unhold(struct session *session);

/* End the session, and give its connection to the caller, who gives it another user. The queue must
 * be empty. */
struct conn *session_leave(struct session *session);
