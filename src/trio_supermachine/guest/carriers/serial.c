#include "carriers/serial.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "carriers/lines.h"
#include "carriers/packet.h"
#include "carriers/sending.h"
#include "core/loop.h"

#define FIRST_LOCAL_PORT 49152u

static struct watch port;
static bool readable, ends_when_empty, hung_up;
static void (*carrier_end)(const char *);

static uint8_t in[MAX_PAYLOAD];
static size_t in_at, in_size;
static struct packet header; /* of the packet being taken in */
static size_t header_size, body_left;
static bool body_is_wanted;

static uint32_t listening_port, last_local_port;
static void (*accepted)(struct conn *conn);

static const struct carrier serial;

/* --- closing, by the user --- */

static void end(struct conn *conn) {
    struct line *line = (struct line *)conn;
    line->said_end = true;
    line_owe(line, OWES_END);
}

static void finish(struct conn *conn) {
    struct line *line = (struct line *)conn;
    conn->user = NULL;
    if (line->state == LEFT) line_owe(line, OWES_RST);
    if (line->state != OPEN || line->owes & OWES_RST) return;
    line->state = CLOSING;
    line_owe(line, OWES_SHUT);
}

static void reset(struct conn *conn) {
    conn->user = NULL;
    line_owe((struct line *)conn, OWES_RST);
}

/* --- receiving --- */

static void resume(struct conn *conn) { line_resume((struct line *)conn); }

static void break_off(struct line *line) {
    conn_let_user_go(&line->conn);
    line_owe(line, OWES_RST);
}

static void owe_nobody(void) { sending_owe_reset(header.dst_port, header.src_port); }

/* Keep a line that the host has closed in order, until its user has used all that came. False: the
 * line has no such user. */
static bool leave(struct line *line) {
    if (line->state != OPEN || !line->conn.user || !line->conn.user->ended) return false;
    line_forget(line);
    line->state = LEFT;
    line_tell_end(line);
    return true;
}

static void take_request(struct line *line) {
    if (line) {
        break_off(line);
    } else if (header.dst_port == listening_port && !lines_are_full()) {
        line = line_add(&serial, header.dst_port, header.src_port, OPEN);
        line->peer_window = header.buf_alloc;
        line_owe(line, OWES_RESPONSE);
        accepted(&line->conn);
    } else {
        owe_nobody();
    }
}

static void take_shut(struct line *line) {
    bool in_order = line->inbox.ended;
    line->peer_deaf |= header.flags & 1;
    line->inbox.ended |= (header.flags & 2) != 0;
    bool both = line->peer_deaf && line->inbox.ended;
    if (both && in_order && leave(line)) owe_nobody();
    else if (both || line->state == CLOSING) break_off(line);
    else line_tell_end(line);
}

static void take_reset(struct line *line) {
    /* When both sides have ended sending, the host closes so. */
    bool both = line->said_end && !(line->owes & OWES_END) && line->inbox.ended;
    if (both && leave(line)) return;
    conn_let_user_go(&line->conn);
    line_drop(line);
}

static void take_data(struct line *line) {
    bool beyond = line->received - line->consumed + header.len > line->window;
    if (line->state == DIALING || line->inbox.ended || beyond) {
        break_off(line);
        return;
    }
    line->received += header.len;
    body_is_wanted = true;
}

static const char *take_quiet_op(void) {
    if (header.src_port || header.dst_port || header.len) return "a packet that concerns nothing";
    if (header.op == OP_FREEZE && voice == TALKING) {
        voice = ENDING;
    } else if (header.op == OP_THAW && voice == QUIET) {
        voice = TALKING;
    } else if (header.op == OP_RESET && voice == QUIET) {
        voice = TALKING;
        sending_forget();
        lines_drop_all();
    } else {
        return "an operation out of order";
    }
    return NULL;
}

/* Act on `header`. Returns NULL, or why the carrier has to end. */
static const char *take_header(void) {
    if (header.src_cid != HOST_CID || header.dst_cid != GUEST_CID) return "a packet for others";
    if (header.type != STREAM_TYPE) return "a packet of unknown type";
    if (header.op == OP_FREEZE || header.op == OP_THAW || header.op == OP_RESET)
        return take_quiet_op();
    if (header.op < REQUEST || header.op > CREDIT_REQUEST) return "an unknown operation";
    if (voice != TALKING) return "a packet in the silence";
    if (header.len > MAX_PAYLOAD) return "a packet too long";
    body_left = header.len;
    body_is_wanted = false;
    struct line *line = line_find(header.dst_port, header.src_port);
    if (line && line->owes & OWES_RST) {
        if (header.op == RST) line_drop(line);
        return NULL;
    }
    if (header.op == REQUEST) {
        take_request(line);
        return NULL;
    }
    if (!line) {
        if (header.op != RST) owe_nobody();
        return NULL;
    }
    line->peer_window = header.buf_alloc;
    line->peer_consumed = header.fwd_cnt;
    if (line->short_of_credit) conn_queue(&line->conn);
    line->short_of_credit = false;
    switch (header.op) {
    case RESPONSE:
        if (line->state != DIALING) break_off(line);
        else line->state = OPEN, conn_queue(&line->conn);
        break;
    case RST: take_reset(line); break;
    case SHUT: take_shut(line); break;
    case RW: take_data(line); break;
    case CREDIT_UPDATE: break; /* credit is taken from every packet */
    default:
        line->told_consumed = line->consumed - 1; /* have it told even if nothing is new */
        line_owe(line, OWES_CREDIT);
    }
    return NULL;
}

static void take_body(const uint8_t *bytes, size_t size) {
    /* Look again: the line may have gone since the header came. */
    struct line *line = body_is_wanted ? line_find(header.dst_port, header.src_port) : NULL;
    if (line) line_take(line, bytes, size);
}

static void parse(void) {
    while (in_at < in_size && !sending_owes_too_many()) {
        if (body_left) {
            size_t size = smaller(body_left, in_size - in_at);
            take_body(in + in_at, size);
            in_at += size;
            body_left -= size;
            continue;
        }
        size_t size = smaller(sizeof header - header_size, in_size - in_at);
        memcpy((uint8_t *)&header + header_size, in + in_at, size);
        in_at += size;
        header_size += size;
        if (header_size < sizeof header) return;
        header_size = 0;
        const char *wrong = take_header();
        if (wrong) carrier_end(wrong);
    }
}

static bool take(void) {
    parse();
    if (in_at < in_size) return sending_is_possible(); /* first, owed resets must go out */
    in_at = in_size = 0;
    /* Read all that is there: a read gives one page at the most, and a program is to get its stdin
     * in large pieces. */
    while (readable && in_size < sizeof in) {
        ssize_t got = read(port.fd, in + in_size, sizeof in - in_size);
        if (got > 0) {
            in_size += (size_t)got;
        } else if (got == 0) {
            readable = false; /* a virtio port reads so while the host's end is not open */
            hung_up = ends_when_empty;
        } else if (errno == EAGAIN) {
            readable = false;
        } else if (errno != EINTR) {
            carrier_end(strerror(errno));
        }
    }
    parse();
    if (in_at < in_size) return sending_is_possible();
    if (hung_up) carrier_end(NULL);
    return readable;
}

static void port_ready(struct watch *watch, uint32_t events) {
    (void)watch;
    if (events & ~(uint32_t)EPOLLOUT) readable = true;
    if (events & ~(uint32_t)EPOLLIN) sending_may_go_on();
}

static uint32_t free_port(uint32_t to) {
    do
        if (++last_local_port < FIRST_LOCAL_PORT) last_local_port = FIRST_LOCAL_PORT;
    while (line_find(last_local_port, to));
    return last_local_port;
}

static struct conn *dial(uint32_t to) {
    struct line *line = line_add(&serial, free_port(to), to, DIALING);
    line_owe(line, OWES_REQUEST);
    return &line->conn;
}

static void listen_on(uint32_t at, void (*then)(struct conn *)) {
    listening_port = at;
    accepted = then;
}

static const struct carrier serial = {
    .reserve = sending_reserve,
    .commit = sending_commit,
    .resume = resume,
    .end = end,
    .finish = finish,
    .reset = reset,
    .turn = sending_turn,
    .can_send = sending_can,
    .flush = sending_flush,
    .dial = dial,
    .listen = listen_on,
    .take = take,
};

const struct carrier *serial_carrier(int fd, bool hangs_up, void (*end)(const char *reason)) {
    ends_when_empty = hangs_up;
    carrier_end = end;
    readable = true;
    sending_open(fd, end);
    watch_add(&port, fd, EPOLLIN | EPOLLOUT, port_ready);
    return &serial;
}
