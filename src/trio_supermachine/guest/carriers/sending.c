#include "carriers/sending.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define WRITE_SIZE 32768u /* Linux's virtio-console driver takes as much in one write */
#define MAX_RESETS 64u    /* owed for packets that concern no line */

enum voice voice;

static int port = -1;
static bool writable;
static void (*port_broken)(const char *);

static uint8_t out[WRITE_SIZE];
static size_t out_at, out_size;

static struct {
    uint32_t local_port, peer_port;
} resets[MAX_RESETS];
static unsigned reset_count;

void sending_open(int fd, void (*broken)(const char *reason)) {
    port = fd;
    port_broken = broken;
    writable = true;
}

void sending_may_go_on(void) { writable = true; }

bool sending_is_possible(void) { return writable; }

void sending_owe_reset(uint32_t local_port, uint32_t peer_port) {
    resets[reset_count].local_port = local_port;
    resets[reset_count++].peer_port = peer_port;
}

bool sending_owes_too_many(void) { return reset_count == MAX_RESETS; }

void sending_forget(void) { out_at = out_size = reset_count = 0; }

/* --- the buffer --- */

static bool flush_out(void) {
    while (out_at < out_size) {
        if (!writable) return false;
        ssize_t written = write(port, out + out_at, out_size - out_at);
        if (written >= 0) {
            out_at += (size_t)written;
        } else if (errno == EAGAIN) {
            writable = false;
        } else if (errno != EINTR) {
            port_broken(strerror(errno));
            return false;
        }
    }
    out_at = out_size = 0;
    return true;
}

static void put(struct line *line, unsigned op, uint32_t flags, uint32_t size) {
    struct packet packet = {
        .src_cid = GUEST_CID,
        .dst_cid = HOST_CID,
        .src_port = line->local_port,
        .dst_port = line->peer_port,
        .len = size,
        .type = STREAM_TYPE,
        .op = (uint16_t)op,
        .flags = flags,
        .buf_alloc = line->window,
        .fwd_cnt = line->consumed,
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

bool sending_can(void) {
    if (voice != TALKING) return false;
    /* Send the rest of the last write first, and have some room for a packet. */
    if ((out_at || WRITE_SIZE - out_size < WRITE_SIZE / 8) && !flush_out()) return false;
    put_resets();
    return writable;
}

void sending_flush(void) {
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

/* --- a connection's turn --- */

size_t sending_reserve(struct conn *conn, uint8_t **at) {
    struct line *line = (struct line *)conn;
    size_t used = out_size + sizeof(struct packet);
    if (line->state != OPEN || out_at || used >= WRITE_SIZE) return 0;
    uint32_t in_flight = line->sent - line->peer_consumed;
    uint32_t credit = in_flight < line->peer_window ? line->peer_window - in_flight : 0;
    if (credit < WRITE_SIZE - used) line->short_of_credit = true;
    *at = out + used;
    return smaller(credit, WRITE_SIZE - used);
}

void sending_commit(struct conn *conn, size_t size) {
    struct line *line = (struct line *)conn;
    put(line, RW, 0, (uint32_t)size);
    line->sent += (uint32_t)size;
}

bool sending_turn(struct conn *conn) {
    struct line *line = (struct line *)conn;
    if (line->state == LEFT) {
        if (line->owes & OWES_RST) line_drop(line); /* the host has forgotten it */
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
    if (line->owes & OWES_SHUT) { /* ahead of RST, which alone would say that bytes were lost */
        put(line, SHUT, 3, 0);
        line->owes &= ~OWES_SHUT;
        return line->owes;
    }
    if (line->owes & OWES_RST) {
        put(line, RST, 0, 0);
        line_drop(line);
        return false;
    }
    bool more = line->conn.user && line->state == OPEN && line->conn.user->pump(conn);
    if (line->owes & OWES_CREDIT) {
        /* Send no packet for it if data that went out a moment ago has told it. */
        line->owes &= ~OWES_CREDIT;
        if (line->told_consumed != line->consumed &&
            WRITE_SIZE - out_size >= sizeof(struct packet) && !out_at)
            put(line, CREDIT_UPDATE, 0, 0);
        else if (line->told_consumed != line->consumed) line->owes |= OWES_CREDIT;
    }
    return more || line->owes;
}
