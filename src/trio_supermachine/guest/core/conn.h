/* Connections with the host: byte streams, whatever carries them.
 *
 * Theory of operation
 *
 * A *carrier* (carriers/) moves the bytes; a *user* makes sense of them: a session, a relay or a
 * flow of datagrams. Each knows the other as a table of functions only. A carrier's own part of a
 * connection is called its *line*; it begins with `struct conn`, and the carrier frees it.
 *
 * Receiving is pushed. The carrier offers what has come; a user that cannot use all of it says how
 * much, and calls `resume` when it can use more. The carrier keeps what is left, up to a bound, and
 * holds the host back beyond that.
 *
 * Sending is pulled. A connection with something to send is put into one queue. In each turn of the
 * loop the carrier asks the connections of the queue one after the other, each for a packet or so.
 * So no connection starves another, and nothing is buffered between user and carrier. Within its
 * turn a user calls `reserve`, writes there, and calls `commit`.
 *
 * An end has three forms. `end` says that no more is sent; receiving goes on. `finish` closes after
 * all that was committed is out. `reset` closes at once, and the host hears that something was
 * lost. After the last two the connection has no user, and the user must not touch it.
 *
 * A connection that the host closes or resets has gone: its user hears `gone`, once, and nothing
 * more. Its memory stays until the end of the turn (free_later), so that a function that is under
 * way may still look at it. */
#pragma once

#include "core/util.h"

struct conn;

/* Functions of a user. */
struct conn_user {
    /* Use bytes that came. Returns how many were used; the rest is offered again after `resume`. */
    size_t (*input)(struct conn *conn, const uint8_t *bytes, size_t size);
    /* Send, if there is something: reserve and commit once. Returns whether there may be more. */
    bool (*pump)(struct conn *conn);
    /* Hear that the host sends no more; all that it sent has been used. NULL for a user to whom the
     * end alone is nothing: it hears `gone` when the host closes, and may miss what came before. */
    void (*ended)(struct conn *conn);
    /* Hear that the host has closed or reset the connection. It is the last call. */
    void (*gone)(struct conn *conn);
};

/* Functions of a carrier. */
struct carrier {
    /* Say where to put bytes to send, and how many can go now (perhaps 0). */
    size_t (*reserve)(struct conn *conn, uint8_t **at);
    /* Send this many of the bytes put there. */
    void (*commit)(struct conn *conn, size_t size);
    /* Offer what was not used again. */
    void (*resume)(struct conn *conn);
    /* Send no more after what is committed. Receiving goes on. */
    void (*end)(struct conn *conn);
    /* Close once everything committed is out. The connection has no user from now on. */
    void (*finish)(struct conn *conn);
    /* Close at once. The connection has no user from now on. */
    void (*reset)(struct conn *conn);
    /* Let the connection send, in its turn. Returns whether it wants another. */
    bool (*turn)(struct conn *conn);
    /* Say whether any connection could send now. */
    bool (*can_send)(void);
    /* Write out what is gathered: nobody sends more in this turn of the loop. */
    void (*flush)(void);
    /* Dial a host port. NULL with errno if that fails at once. */
    struct conn *(*dial)(uint32_t port);
    /* Begin to accept the host's connections to one port, and hand each to `accepted`, which gives
     * it a user. Called once. */
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
    bool closed; /* set before `gone`: the host ended in order, and all that it sent was used */
};

/* Put a connection into the queue of those that have something to send. */
void conn_queue(struct conn *conn);
void conn_unqueue(struct conn *conn);

/* Let those in the queue send in turn, as far as a turn of the loop goes.
 * Returns whether more could be sent at once. */
bool conn_run_queue(const struct carrier *carrier);

/* For carriers: tell the user that the connection has gone, and leave it without one. */
void conn_let_user_go(struct conn *conn);
