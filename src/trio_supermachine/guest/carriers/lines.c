#include "carriers/lines.h"

#include <sys/sysinfo.h>

#include "core/loop.h"

/* Windows. The first lines have the wide one, those beyond have the narrow one. In a small machine
 * there are fewer wide ones, and the narrow one is smaller: the windows of 1024 lines are an eighth
 * of its memory at the most. */
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
    static size_t share; /* a sixteenth of this machine's memory */
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
    line->inbox.bound = line->window;
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
    inbox_release(&line->inbox);
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
    /* Take all out first: a user that is let go may dial anew. */
    for (size_t i = 0; i < BUCKETS; i++)
        while ((line = buckets[i])) {
            buckets[i] = line->next;
            line->next = all;
            all = line;
        }
    while ((line = all)) {
        all = line->next;
        conn_let_user_go(&line->conn);
        dispose(line);
    }
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

void line_take(struct line *line, const uint8_t *bytes, size_t size) {
    count_consumed(line, inbox_take(&line->inbox, &line->conn, bytes, size));
}

void line_resume(struct line *line) {
    count_consumed(line, inbox_offer_again(&line->inbox, &line->conn));
    line_tell_end(line);
}

void line_tell_end(struct line *line) {
    if (!inbox_tell_end(&line->inbox, &line->conn) || line->state != LEFT) return;
    line->conn.closed = true;
    conn_let_user_go(&line->conn);
    line_owe(line, OWES_RST);
}
