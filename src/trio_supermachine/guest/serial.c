#include "serial.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "loop.h"
#include "wire.h"

#define HOST_CID 2
#define GUEST_CID 3
#define STREAM_TYPE 1
#define MAX_PAYLOAD 65536u    /* of a packet that comes */
#define WRITE_SIZE 32768u     /* what Linux's virtio-console driver takes in one write */
#define MAX_CONNECTIONS 4096u
/* What each may have sent that is not used; the memory of this machine bounds their sum. */
#define WIDE_WINDOW 262144u
#define NARROW_WINDOW 65536u
#define WIDE_CONNECTIONS 256u /* those beyond have the narrow one */
#define MAX_RESETS 64u        /* owed to connections that do not exist; then reading stops */
#define FIRST_LOCAL_PORT 49152u
#define BUCKETS 256u

enum op { REQUEST = 1, RESPONSE, RST, SHUT, RW, CREDIT_UPDATE, CREDIT_REQUEST };
/* Not of vsock: around a capture of the machine. They concern no connection. */
enum quiet_op { OP_FREEZE = 16, OP_FROZEN, OP_THAW, OP_RESET };

struct packet {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port, len;
    uint16_t type, op;
    uint32_t flags, buf_alloc, fwd_cnt;
} __attribute__((packed));
_Static_assert(sizeof(struct packet) == 44, "virtio_vsock_hdr");

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
    unsigned owes, peer_shut;
    bool ended;    /* this side has said that it sends no more */
    bool told_end; /* the user knows that the host sends no more */
    uint32_t local_port, peer_port;
    uint32_t window; /* from the host, not used: at the most */
    uint32_t sent, peer_window, peer_consumed;   /* towards the host */
    uint32_t received, consumed, told_consumed;  /* from the host */
    uint8_t *rest;                               /* received and not used yet */
    size_t rest_at, rest_size, rest_room;
    struct line *next;
};

static struct watch port;
static bool readable, writable, ends_when_empty, hung_up;
static void (*carrier_end)(const char *);

/* Between FREEZE and THAW or RESET nothing is sent, but for FROZEN as the last packet. */
static enum { TALKING, ENDING, QUIET } voice;

static uint8_t out[WRITE_SIZE];
static size_t out_at, out_size;

static uint8_t in[MAX_PAYLOAD];
static size_t in_at, in_size;
static struct packet header; /* of the packet being taken in */
static size_t header_size, body_left;
static struct line *body_line; /* NULL: nobody wants this body */

static struct line *buckets[BUCKETS];
static unsigned lines;
static uint32_t listening_port, next_local_port = FIRST_LOCAL_PORT;
static struct { uint32_t local_port, peer_port; } resets[MAX_RESETS];
static unsigned reset_count;

static struct line **bucket(uint32_t local_port, uint32_t peer_port) {
    return &buckets[(local_port * 31 + peer_port) % BUCKETS];
}

static struct line *find(uint32_t local_port, uint32_t peer_port) {
    struct line *line = *bucket(local_port, peer_port);
    while (line && (line->local_port != local_port || line->peer_port != peer_port))
        line = line->next;
    return line;
}

static const struct carrier serial;

static struct line *add(uint32_t local_port, uint32_t peer_port, enum state state) {
    struct line *line = must_alloc(sizeof *line);
    line->conn.carrier = &serial;
    line->state = state;
    line->window = lines < WIDE_CONNECTIONS ? WIDE_WINDOW : NARROW_WINDOW;
    line->local_port = local_port;
    line->peer_port = peer_port;
    struct line **place = bucket(local_port, peer_port);
    line->next = *place;
    *place = line;
    lines++;
    return line;
}

static void dispose(struct line *line) {
    lines--;
    conn_unqueue(&line->conn);
    free_later(line->rest);
    line->rest = NULL;
    free_later(line);
}

static void forget(struct line *line) {
    struct line **link = bucket(line->local_port, line->peer_port);
    while (*link != line) link = &(*link)->next;
    *link = line->next;
    if (body_line == line) body_line = NULL;
}

static void drop(struct line *line) {
    if (line->state != LEFT) forget(line);
    dispose(line);
}

static void let_user_go(struct line *line) {
    const struct conn_user *user = line->conn.user;
    line->conn.user = NULL;
    if (user) user->gone(&line->conn);
}

static void owe(struct line *line, unsigned what) {
    line->owes |= what;
    conn_queue(&line->conn);
}

/* --- sending --- */

static bool flush_out(void) {
    while (out_at < out_size) {
        if (!writable) return false;
        ssize_t written = write(port.fd, out + out_at, out_size - out_at);
        if (written >= 0) {
            out_at += (size_t)written;
        } else if (errno == EAGAIN) {
            writable = false;
        } else if (errno != EINTR) {
            carrier_end(strerror(errno));
            return false;
        }
    }
    out_at = out_size = 0;
    return true;
}

static void put(struct line *line, unsigned op, uint32_t flags, uint32_t size) {
    struct packet packet = {
        .src_cid = GUEST_CID, .dst_cid = HOST_CID,
        .src_port = line->local_port, .dst_port = line->peer_port,
        .len = size, .type = STREAM_TYPE, .op = (uint16_t)op, .flags = flags,
        .buf_alloc = line->window, .fwd_cnt = line->consumed,
    };
    line->told_consumed = line->consumed;
    memcpy(out + out_size, &packet, sizeof packet);
    out_size += sizeof packet + size;
}

static void put_resets(void) {
    while (reset_count && WRITE_SIZE - out_size >= sizeof(struct packet)) {
        reset_count--;
        struct line nobody = {.local_port = resets[reset_count].local_port,
                              .peer_port = resets[reset_count].peer_port};
        put(&nobody, RST, 0, 0);
    }
}

static bool can_send(void) {
    if (voice != TALKING) return false;
    /* What is left over from a write goes first; and a packet deserves some room. */
    if ((out_at || WRITE_SIZE - out_size < WRITE_SIZE / 8) && !flush_out()) return false;
    put_resets();
    return writable;
}

static void flush(void) {
    if (out_at && !flush_out()) return;
    if (voice == TALKING) put_resets();
    if (voice == ENDING) {
        if (WRITE_SIZE - out_size < sizeof(struct packet) && !flush_out()) return;
        struct line nobody = {0};
        put(&nobody, OP_FROZEN, 0, 0);
        voice = QUIET;
    }
    flush_out();
}

static size_t reserve(struct conn *conn, uint8_t **at) {
    struct line *line = (struct line *)conn;
    size_t used = out_size + sizeof(struct packet);
    if (line->state != OPEN || out_at || used >= WRITE_SIZE) return 0;
    uint32_t in_flight = line->sent - line->peer_consumed;
    uint32_t credit = in_flight < line->peer_window ? line->peer_window - in_flight : 0;
    *at = out + used;
    return smaller(credit, WRITE_SIZE - used);
}

static void commit(struct conn *conn, size_t size) {
    struct line *line = (struct line *)conn;
    put(line, RW, 0, (uint32_t)size);
    line->sent += (uint32_t)size;
}

static bool turn(struct conn *conn) {
    struct line *line = (struct line *)conn;
    if (line->state == LEFT) {
        if (line->owes & OWES_RST) drop(line); /* nobody is there to be told */
        return false;
    }
    if (line->owes & (OWES_REQUEST | OWES_RESPONSE)) {
        put(line, line->owes & OWES_REQUEST ? REQUEST : RESPONSE, 0, 0);
        line->owes &= ~(OWES_REQUEST | OWES_RESPONSE | OWES_CREDIT);
        return true;
    }
    if (line->owes & OWES_END) {
        put(line, SHUT, 2, 0);
        line->owes &= ~OWES_END;
        return line->owes;
    }
    if (line->owes & OWES_SHUT) { /* before a reset: it tells that the stream is whole */
        put(line, SHUT, 3, 0);
        line->owes &= ~OWES_SHUT;
        return line->owes;
    }
    if (line->owes & OWES_RST) {
        put(line, RST, 0, 0);
        drop(line);
        return false;
    }
    bool more = line->conn.user && line->state == OPEN && line->conn.user->pump(conn);
    if (line->owes & OWES_CREDIT) {
        /* Data that went out a moment ago has told it already. */
        line->owes &= ~OWES_CREDIT;
        if (line->told_consumed != line->consumed &&
            WRITE_SIZE - out_size >= sizeof(struct packet) && !out_at)
            put(line, CREDIT_UPDATE, 0, 0);
        else if (line->told_consumed != line->consumed)
            line->owes |= OWES_CREDIT;
    }
    return more || line->owes;
}

/* --- the user's side of closing --- */

static void end(struct conn *conn) {
    struct line *line = (struct line *)conn;
    line->ended = true;
    owe(line, OWES_END);
}

static void finish(struct conn *conn) {
    struct line *line = (struct line *)conn;
    conn->user = NULL;
    if (line->state == LEFT) owe(line, OWES_RST);
    if (line->state != OPEN || line->owes & OWES_RST) return;
    line->state = CLOSING;
    owe(line, OWES_SHUT);
}

static void reset(struct conn *conn) {
    conn->user = NULL;
    owe((struct line *)conn, OWES_RST);
}

/* --- receiving --- */

static void count_consumed(struct line *line, size_t size) {
    line->consumed += (uint32_t)size;
    if (line->state != LEFT && line->received - line->told_consumed > line->window / 2)
        owe(line, OWES_CREDIT);
}

static size_t offer(struct line *line, const uint8_t *bytes, size_t size) {
    size_t used = size; /* with no user (any more) it is thrown away */
    if (line->conn.user) used = line->conn.user->input(&line->conn, bytes, size);
    if (!line->conn.user) used = size;
    count_consumed(line, used);
    return used;
}

/* The user hears of the host's end when it has used what came before. */
static void tell_end(struct line *line) {
    const struct conn_user *user = line->conn.user;
    if (!user || !user->ended || line->rest_size || !(line->peer_shut & 2)) return;
    if (!line->told_end) {
        line->told_end = true;
        user->ended(&line->conn);
    }
    if (line->state != LEFT) return;
    line->conn.closed = true;
    let_user_go(line);
    owe(line, OWES_RST);
}

static void resume(struct conn *conn) {
    struct line *line = (struct line *)conn;
    if (line->rest_size) {
        size_t used = offer(line, line->rest + line->rest_at, line->rest_size);
        line->rest_at += used;
        line->rest_size -= used;
        if (line->rest_size) return;
        free_later(line->rest);
        line->rest = NULL;
        line->rest_at = line->rest_room = 0;
    }
    tell_end(line);
}

static void make_room(struct line *line, size_t size) {
    if (line->rest_at + line->rest_size + size <= line->rest_room) return;
    if (line->rest_at) memmove(line->rest, line->rest + line->rest_at, line->rest_size);
    line->rest_at = 0;
    if (line->rest_size + size <= line->rest_room) return;
    size_t room = smaller(2 * (line->rest_size + size), line->window);
    uint8_t *rest = must_alloc(room);
    if (line->rest_size) memcpy(rest, line->rest, line->rest_size);
    free_later(line->rest);
    line->rest = rest;
    line->rest_room = room;
}

static void keep(struct line *line, const uint8_t *bytes, size_t size) {
    if (!size) return;
    make_room(line, size);
    memcpy(line->rest + line->rest_at + line->rest_size, bytes, size);
    line->rest_size += size;
}

static void take_body(const uint8_t *bytes, size_t size) {
    struct line *line = body_line;
    if (!line) return;
    size_t used = line->rest_size ? 0 : offer(line, bytes, size);
    keep(line, bytes + used, size - used);
}

static void break_off(struct line *line) {
    let_user_go(line);
    owe(line, OWES_RST);
}

static void owe_nobody(void) {
    resets[reset_count].local_port = header.dst_port;
    resets[reset_count++].peer_port = header.src_port;
}

/* The host has closed the connection, having ended sending: a user who cares for what it sent gets
 * all of it. False: there is none. */
static bool leave(struct line *line) {
    if (line->state != OPEN || !line->conn.user || !line->conn.user->ended) return false;
    forget(line);
    line->state = LEFT;
    tell_end(line);
    return true;
}

static void take_request(struct line *line) {
    if (line) {
        break_off(line);
    } else if (header.dst_port == listening_port && lines < MAX_CONNECTIONS) {
        line = add(header.dst_port, header.src_port, OPEN);
        line->peer_window = header.buf_alloc;
        owe(line, OWES_RESPONSE);
        conn_accepted(&line->conn);
    } else {
        owe_nobody();
    }
}

static void take_shut(struct line *line) {
    bool in_order = line->peer_shut & 2;
    line->peer_shut |= header.flags & 3;
    if (line->peer_shut == 3 && in_order && leave(line)) owe_nobody();
    else if (line->peer_shut == 3 || line->state == CLOSING) break_off(line);
    else tell_end(line);
}

static void take_reset(struct line *line) {
    /* Where both have ended it is how the host closes. */
    if (line->ended && line->peer_shut & 2 && leave(line)) return;
    let_user_go(line);
    drop(line);
}

static void take_data(struct line *line) {
    /* The peer counts what it has sent against fwd_cnt; beyond the window it gets a reset. */
    bool beyond = line->received - line->consumed + header.len > line->window;
    if (line->state == DIALING || line->peer_shut & 2 || beyond) {
        break_off(line);
        return;
    }
    line->received += header.len;
    body_line = line;
}

/* This machine is a copy: no connection that the original had exists. */
static void forget_all(void) {
    struct line *all = NULL, *line;
    out_at = out_size = 0;
    reset_count = 0;
    /* Taken out first: letting one of them go may dial anew. */
    for (size_t i = 0; i < BUCKETS; i++)
        while ((line = buckets[i])) {
            buckets[i] = line->next;
            line->next = all;
            all = line;
        }
    while ((line = all)) {
        all = line->next;
        let_user_go(line);
        dispose(line);
    }
}

static const char *take_quiet_op(void) {
    if (header.src_port || header.dst_port || header.len) return "a packet that concerns nothing";
    if (header.op == OP_FREEZE && voice == TALKING) {
        voice = ENDING;
    } else if (header.op == OP_THAW && voice == QUIET) {
        voice = TALKING;
    } else if (header.op == OP_RESET && voice == QUIET) {
        voice = TALKING;
        forget_all();
    } else {
        return "an operation out of order";
    }
    return NULL;
}

/* Act on `header`. Returns NULL, or what makes this carrier useless. */
static const char *take_header(void) {
    if (header.src_cid != HOST_CID || header.dst_cid != GUEST_CID) return "a packet for others";
    if (header.type != STREAM_TYPE) return "a packet of unknown type";
    if (header.op == OP_FREEZE || header.op == OP_THAW || header.op == OP_RESET) return take_quiet_op();
    if (header.op < REQUEST || header.op > CREDIT_REQUEST) return "an unknown operation";
    if (voice != TALKING) return "a packet in the silence";
    if (header.len > MAX_PAYLOAD) return "a packet too long";
    body_left = header.len;
    body_line = NULL;
    struct line *line = find(header.dst_port, header.src_port);
    if (line && line->owes & OWES_RST) {
        if (header.op == RST) drop(line);
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
    bool had_no_credit = line->sent - line->peer_consumed >= line->peer_window;
    line->peer_window = header.buf_alloc;
    line->peer_consumed = header.fwd_cnt;
    if (had_no_credit) conn_queue(&line->conn);
    switch (header.op) {
    case RESPONSE:
        if (line->state != DIALING) break_off(line);
        else line->state = OPEN, conn_queue(&line->conn);
        break;
    case RST: take_reset(line); break;
    case SHUT: take_shut(line); break;
    case RW: take_data(line); break;
    case CREDIT_UPDATE: break; /* which all packets are */
    default:
        line->told_consumed = line->consumed - 1; /* asked for, so told even if nothing is new */
        owe(line, OWES_CREDIT);
    }
    return NULL;
}

static void parse(void) {
    while (in_at < in_size && reset_count < MAX_RESETS) {
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
    if (in_at < in_size) return writable; /* the resets owed go out first */
    in_at = in_size = 0;
    /* A read gives a page at the most: what is there is taken in together, so that a program
     * gets its stdin in large pieces. */
    while (readable && in_size < sizeof in) {
        ssize_t got = read(port.fd, in + in_size, sizeof in - in_size);
        if (got > 0) {
            in_size += (size_t)got;
        } else if (got == 0) {
            readable = false; /* on a virtio port: the host's end is not open now */
            hung_up = ends_when_empty;
        } else if (errno == EAGAIN) {
            readable = false;
        } else if (errno != EINTR) {
            carrier_end(strerror(errno));
        }
    }
    parse();
    if (in_at < in_size) return writable;
    if (hung_up) carrier_end(NULL);
    return readable;
}

static void port_ready(struct watch *watch, uint32_t events) {
    (void)watch;
    if (events & ~(uint32_t)EPOLLOUT) readable = true;
    if (events & ~(uint32_t)EPOLLIN) writable = true;
}

static struct conn *dial(uint32_t to) {
    struct line *line = add(next_local_port++, to, DIALING);
    owe(line, OWES_REQUEST);
    return &line->conn;
}

static void listen_on(uint32_t at) { listening_port = at; }

static const struct carrier serial = {
    .reserve = reserve, .commit = commit, .resume = resume, .end = end, .finish = finish,
    .reset = reset, .turn = turn, .can_send = can_send, .flush = flush, .dial = dial,
    .listen = listen_on, .take = take,
};

const struct carrier *serial_carrier(int fd, bool hangs_up, void (*end)(const char *reason)) {
    ends_when_empty = hangs_up;
    carrier_end = end;
    readable = writable = true;
    watch_add(&port, fd, EPOLLIN | EPOLLOUT, port_ready);
    return &serial;
}
