/* The connections of the serial carrier: what is known of each, and what it has received. */
#pragma once

#include "carriers/inbox.h"

#define MAX_LINES 4096u

enum state {
    DIALING,
    OPEN,
    CLOSING, /* shut down, the host's RST is due */
    LEFT,    /* the host has closed it, and knows it no more; what it sent is not all used */
};
enum {
    OWES_REQUEST = 1,
    OWES_RESPONSE = 2,
    OWES_CREDIT = 4,
    OWES_END = 8,
    OWES_SHUT = 16,
    OWES_RST = 32,
};

struct line {
    struct conn conn;
    enum state state;
    unsigned owes;
    bool said_end;  /* this side has said that it sends no more */
    bool peer_deaf; /* the host receives no more */
    uint32_t local_port, peer_port;
    uint32_t window;                            /* from the host, not used: at the most */
    uint32_t sent, peer_window, peer_consumed;  /* towards the host */
    bool short_of_credit;                       /* it would have sent more */
    uint32_t received, consumed, told_consumed; /* from the host */
    struct inbox inbox;
    struct line *next;
};

struct line *line_find(uint32_t local_port, uint32_t peer_port);
bool lines_are_full(void);
struct line *line_add(const struct carrier *carrier, uint32_t local_port, uint32_t peer_port,
                      enum state state);

/* No packet concerns it any more. */
void line_forget(struct line *line);

/* The same, and the end of it. Its user has been let go. */
void line_drop(struct line *line);

/* All of them have gone: users are told, once none can be found any more. */
void lines_drop_all(void);

/* Something is to be said on it. */
void line_owe(struct line *line, unsigned what);

/* Hand what came to the user, and keep what that does not use. */
void line_take(struct line *line, const uint8_t *bytes, size_t size);

/* The user can use more of it. */
void line_resume(struct line *line);

/* The host has ended: the user hears of it when it has used what came before. */
void line_tell_end(struct line *line);
