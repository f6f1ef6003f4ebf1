#include "carriers/lines.h"

#include <string.h>
#include <sys/sysinfo.h>

#include "core/loop.h"

/* What each may have sent that is not used. The first few have the wide window, those beyond have the
 * narrow one, which is less in a small machine: 1024 of all take an eighth of its memory. */
#define WIDE_WINDOW 262144u
#define WIDE_LINES 256u
#define NARROW_WINDOW 65536u
#define LEAST_WINDOW 4096u
#define MANY_LINES 1024u
#define BUCKETS 256u

static struct line *buckets[BUCKETS];
static unsigned lines;

/* --- the table --- */

static struct line **bucket(uint32_t local_port, uint32_t peer_port) {
    return &buckets[(local_port * 31 + peer_port) % BUCKETS];
}

struct line *line_find(uint32_t local_port, uint32_t peer_port) {
    struct line *line = *bucket(local_port, peer_port);
    while (line && (line->local_port != local_port || line->peer_port != peer_port))
        line = line->next;
    return line;
}

static uint32_t next_window(void) {
    static size_t share; /* of this machine's memory */
    struct sysinfo machine;
    if (!share) share = sysinfo(&machine) ? 1 : machine.totalram / 16 * machine.mem_unit;
    if (!lines || lines < smaller(WIDE_LINES, share / WIDE_WINDOW)) return WIDE_WINDOW;
    size_t narrow = smaller(share / MANY_LINES, NARROW_WINDOW);
    return narrow < LEAST_WINDOW ? LEAST_WINDOW : (uint32_t)narrow;
}

bool lines_are_full(void) { return lines >= MAX_LINES; }

struct line *line_add(const struct carrier *carrier, uint32_t local_port, uint32_t peer_port,
                      enum state state) {
    struct line *line = must_alloc(sizeof *line);
    line->conn.carrier = carrier;
    line->state = state;
    line->window = next_window();
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

void line_forget(struct line *line) {
    struct line **link = bucket(line->local_port, line->peer_port);
    while (*link != line) link = &(*link)->next;
    *link = line->next;
}

void line_drop(struct line *line) {
    if (line->state != LEFT) line_forget(line);
    dispose(line);
}

void lines_drop_all(void) {
    struct line *all = NULL, *line;
    /* Taken out first: letting one of them go may dial anew. */
    for (size_t i = 0; i < BUCKETS; i++)
        while ((line = buckets[i])) {
            buckets[i] = line->next;
            line->next = all;
            all = line;
        }
    while ((line = all)) {
        all = line->next;
        line_let_user_go(line);
        dispose(line);
    }
}

void line_let_user_go(struct line *line) {
    const struct conn_user *user = line->conn.user;
    line->conn.user = NULL;
    if (user) user->gone(&line->conn);
}

void line_owe(struct line *line, unsigned what) {
    line->owes |= what;
    conn_queue(&line->conn);
}

/* --- what has come --- */

static void count_consumed(struct line *line, size_t size) {
    line->consumed += (uint32_t)size;
    if (line->state != LEFT && line->received - line->told_consumed > line->window / 2)
        line_owe(line, OWES_CREDIT);
}

static size_t offer(struct line *line, const uint8_t *bytes, size_t size) {
    size_t used = size; /* with no user (any more) it is thrown away */
    if (line->conn.user) used = line->conn.user->input(&line->conn, bytes, size);
    if (!line->conn.user) used = size;
    count_consumed(line, used);
    return used;
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

void line_take(struct line *line, const uint8_t *bytes, size_t size) {
    size_t used = line->rest_size ? 0 : offer(line, bytes, size);
    keep(line, bytes + used, size - used);
}

void line_resume(struct line *line) {
    if (line->rest_size) {
        size_t used = offer(line, line->rest + line->rest_at, line->rest_size);
        line->rest_at += used;
        line->rest_size -= used;
        if (line->rest_size) return;
        free_later(line->rest);
        line->rest = NULL;
        line->rest_at = line->rest_room = 0;
    }
    line_tell_end(line);
}

void line_tell_end(struct line *line) {
    const struct conn_user *user = line->conn.user;
    if (!user || !user->ended || line->rest_size || !(line->peer_shut & 2)) return;
    if (!line->told_end) {
        line->told_end = true;
        user->ended(&line->conn);
    }
    if (line->state != LEFT) return;
    line->conn.closed = true;
    line_let_user_go(line);
    line_owe(line, OWES_RST);
}
