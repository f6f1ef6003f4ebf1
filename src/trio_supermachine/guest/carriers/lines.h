/* The lines of the serial carrier: a table, and for each what is known and what it has received.
 * serial.h has the states and rules. */
#pragma once

#include "carriers/inbox.h"

#define MAX_LINES 4096u

enum state {
    DIALING, /* REQUEST is owed or sent */
    OPEN,
    CLOSING, /* shut down; the host's RST is due */
    LEFT,    /* closed by the host and in no table; its user has not used all that came */
};

/* What is to be said on a line. */
enum {
    OWES_REQUEST = 1,
    OWES_RESPONSE = 2,
    OWES_CREDIT = 4,
    OWES_END = 8,   /* SHUT of sending */
    OWES_SHUT = 16, /* SHUT of both */
    OWES_RST = 32,  /* and then the line is dropped */
};

struct line {
    struct conn conn;
    enum state state;
    unsigned owes;
    bool said_end;  /* the user sends no more */
    bool peer_deaf; /* the host receives no more */
    uint32_t local_port, peer_port;

    uint32_t window;                            /* bound on what came and was not used */
    uint32_t received, consumed, told_consumed; /* bytes that came; that were used; as told */
    struct inbox inbox;

    uint32_t sent, peer_window, peer_consumed;
    bool short_of_credit; /* more would have been sent */
    struct line *next;    /* in its bucket */
};

struct line *line_find(uint32_t local_port, uint32_t peer_port);
bool lines_are_full(void);
struct line *line_add(const struct carrier *carrier, uint32_t local_port, uint32_t peer_port,
                      enum state state);

/* Take a line out of the table: no packet concerns it any more. */
void line_forget(struct line *line);

/* Forget a line and free it. It must have no user. */
void line_drop(struct line *line);

/* Drop all lines, and tell their users, once none can be found any more. */
void lines_drop_all(void);

/* Have this said, in the line's turn. */
void line_owe(struct line *line, unsigned what);

/* Hand what came to the user, through the inbox. */
void line_take(struct line *line, const uint8_t *bytes, size_t size);

/* Offer what is kept again. */
void line_resume(struct line *line);

/* Tell the user of the host's end, if it is time. A line that was LEFT is over by that. */
void line_tell_end(struct line *line);
