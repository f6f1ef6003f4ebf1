/* What has come on a connection, up to its user.
 *
 * A user may use less than it is offered. What it leaves is kept here, and is offered again, ahead
 * of all that comes later, when the carrier is told to resume. The host's end counts from when all
 * that came before it has been used. So a user sees bytes in order, once each, and the end behind
 * them.
 *
 * Both carriers bound what is kept. The serial one has given the host a window and ends a
 * connection that sends beyond it. The one of sockets does not read while anything is kept, so that
 * no more than one reading ever is. */
#pragma once

#include "core/conn.h"

struct inbox {
    uint8_t *kept; /* NULL: none */
    size_t at, size, room;
    size_t bound; /* of what is ever kept at once */
    bool ended;   /* the host sends no more */
    bool told;    /* and the user knows */
};

/* Offer this to the user, unless something is kept, and keep what is not used. Returns how much was
 * used: all of it, if there is no user (any more). */
size_t inbox_take(struct inbox *inbox, struct conn *conn, const uint8_t *bytes, size_t size);

/* Offer what is kept once more. Returns how much was used. */
size_t inbox_offer_again(struct inbox *inbox, struct conn *conn);

/* Tell the user of the end, if it cares, has used all and was not told before. Returns whether it
 * knows. */
bool inbox_tell_end(struct inbox *inbox, struct conn *conn);

/* Keep nothing, at the latest from the end of this turn on. */
void inbox_release(struct inbox *inbox);
