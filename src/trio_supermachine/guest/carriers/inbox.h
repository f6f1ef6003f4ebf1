/* The inbox of a connection: what has come and was not used, and the end behind it.
 *
 * A user may use less than it is offered. The rest is kept here. It is offered again, ahead of all
 * that came later, when the user resumes. The host's end is told when all that came before it has
 * been used. So a user sees each byte once, in order, and the end last.
 *
 * Both carriers bound what is kept. The serial carrier has given the host a window, and ends a
 * connection that sends beyond it. The socket carrier does not read while something is kept: what
 * is kept is what one reading gave, at the most. */
#pragma once

#include "core/conn.h"

struct inbox {
    uint8_t *kept; /* NULL: nothing */
    size_t at, size, room;
    size_t bound; /* on `size` */
    bool ended;   /* the host sends no more */
    bool told;    /* the user knows that */
};

/* Offer bytes to the user, unless older ones are kept, and keep what it does not use. Returns how
 * much was used: all, if there is no user (any more). */
size_t inbox_take(struct inbox *inbox, struct conn *conn, const uint8_t *bytes, size_t size);

/* Offer what is kept once more. Returns how much was used. */
size_t inbox_offer_again(struct inbox *inbox, struct conn *conn);

/* Tell the user of the end, once, if it wants to know and has used all that came before. Returns
 * whether such a user knows. */
bool inbox_tell_end(struct inbox *inbox, struct conn *conn);

/* Throw away what is kept. Its memory stays until the end of the turn. */
void inbox_release(struct inbox *inbox);
