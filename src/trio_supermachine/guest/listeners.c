#include "listeners.h"

#include <stdio.h>
#include <stdlib.h>

#include "loop.h"

#define LOOK_MS 20u
#define LISTEN 0x0A /* TCP_LISTEN, as the kernel's tables have it */

struct waiter {
    struct session *session;
    uint64_t until_ns;
    struct waiter *next;
};

static struct waiter *waiters;
static struct timer next_look;

/* Sockets are numbered as they are made: the lowest number is the first. The kernel lists those
 * that listen before all others, so that many connections cost nothing. */
static void find_in(const char *table, unsigned long *first, uint32_t *port) {
    FILE *file = fopen(table, "re");
    char line[512];
    unsigned here, state;
    unsigned long inode;
    if (!file) return;
    if (fgets(line, sizeof line, file)) /* the heading */
        while (fgets(line, sizeof line, file) &&
               sscanf(line, " %*u: %*[0-9A-F]:%x %*[0-9A-F]:%*x %x %*x:%*x %*x:%*x %*x %*u %*u %lu",
                      &here, &state, &inode) == 3 &&
               state == LISTEN)
            if (!*port || inode < *first) {
                *port = here;
                *first = inode;
            }
    fclose(file);
}

static uint32_t first_listener(void) {
    unsigned long first = 0;
    uint32_t port = 0;
    find_in("/proc/net/tcp", &first, &port);
    find_in("/proc/net/tcp6", &first, &port);
    return port;
}

static void answer(struct session *session, uint32_t port) {
    session_send_ok(session, port);
    session_finish(session); /* which makes it a waiter no more */
}

static void look(struct timer *timer) {
    (void)timer;
    uint32_t port = first_listener();
    uint64_t now = now_ns();
    for (struct waiter *waiter = waiters, *next; waiter; waiter = next) {
        next = waiter->next;
        if (port || waiter->until_ns <= now) answer(waiter->session, port);
    }
    if (waiters) timer_set(&next_look, now + LOOK_MS * NS_PER_MS, look);
}

void listeners_await(struct session *session, uint32_t timeout_ms) {
    uint32_t port = first_listener();
    if (port || !timeout_ms) {
        answer(session, port);
        return;
    }
    struct waiter *waiter = must_alloc(sizeof *waiter);
    uint64_t now = now_ns();
    waiter->session = session;
    waiter->until_ns = now + timeout_ms * NS_PER_MS;
    waiter->next = waiters;
    if (!waiters) timer_set(&next_look, now + LOOK_MS * NS_PER_MS, look);
    waiters = waiter;
}

void listeners_forget(struct session *session) {
    for (struct waiter **link = &waiters; *link; link = &(*link)->next)
        if ((*link)->session == session) {
            struct waiter *waiter = *link;
            *link = waiter->next;
            free(waiter);
            break;
        }
    if (!waiters) timer_clear(&next_look);
}
