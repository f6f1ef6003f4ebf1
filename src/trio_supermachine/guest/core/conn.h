/* A connection with the host: a stream of bytes each way, whatever carries it.
 *
 * Below is a carrier (serial.c, sockets.c); above is a session (session.c). Sending is pulled:
 * a carrier that can send asks the next connection in the queue, in turn, for at most one
 * packet, so that none starves another and nothing is buffered in between. */
#pragma once

#include "core/util.h"

struct conn;

struct conn_user {
    /* Bytes came. Returns how many were used; the rest is offered again after conn_resume. */
    size_t (*input)(struct conn *conn, const uint8_t *bytes, size_t size);
    /* Sending is possible: reserve and commit once. Returns whether there may be more. */
    bool (*pump)(struct conn *conn);
    /* The host sends no more, and all that it sent has been used. NULL: that is nothing to this
     * user, who has no use either for what came before the host closed. */
    void (*ended)(struct conn *conn);
    /* The host has closed or reset it. No call comes after this one. */
    void (*gone)(struct conn *conn);
};

struct carrier {
    /* Where to put bytes to send, and how many can go now (perhaps 0). */
    size_t (*reserve)(struct conn *conn, uint8_t **at);
    void (*commit)(struct conn *conn, size_t size);
    void (*resume)(struct conn *conn);
    /* After what is committed no more is sent; receiving goes on. */
    void (*end)(struct conn *conn);
    /* Close it once everything committed is out; or at once and rudely. The user is let go. */
    void (*finish)(struct conn *conn);
    void (*reset)(struct conn *conn);
    /* The connection's turn to send. Returns whether it wants another. */
    bool (*turn)(struct conn *conn);
    /* Whether any connection could send now; and: nobody sends more in this turn. */
    bool (*can_send)(void);
    void (*flush)(void);
    /* Dial a host port. NULL with errno if that fails at once. */
    struct conn *(*dial)(uint32_t port);
    /* Begin to accept the host's connections to one port, and hand each to `accepted`, which gives
     * it a user. Once. */
    void (*listen)(uint32_t port, void (*accepted)(struct conn *conn));
    /* Take in what has come, within the bounds of a turn. Returns whether there is more. */
    bool (*take)(void);
};

struct conn {
    const struct carrier *carrier;
    const struct conn_user *user; /* NULL: none (any more) */
    void *owner;                  /* the user's */
    struct conn *next, *previous; /* in the queue of those who want to send */
    bool queued;
    bool closed; /* when it has gone: in order, all that the host sent having been used */
};

/* Put a connection into the queue of those that have something to send. */
void conn_queue(struct conn *conn);
void conn_unqueue(struct conn *conn);

/* For carriers: the user hears that the connection has gone, and nothing of it after that. */
void conn_let_user_go(struct conn *conn);

/* Let those in the queue send in turn, as far as a turn of the loop goes.
 * Returns whether there is more that could be sent at once. */
bool conn_run_queue(const struct carrier *carrier);
