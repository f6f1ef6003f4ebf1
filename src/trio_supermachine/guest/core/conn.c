#include "core/conn.h"

/* Packets sent before the loop looks for input again. */
#define PACKETS_PER_TURN 16

static struct conn *head, *tail;

void conn_queue(struct conn *conn) {
    if (conn->queued) return;
    conn->queued = true;
    conn->next = NULL;
    conn->previous = tail;
    if (tail) tail->next = conn;
    else head = conn;
    tail = conn;
}

void conn_unqueue(struct conn *conn) {
    if (!conn->queued) return;
    conn->queued = false;
    if (conn->previous) conn->previous->next = conn->next;
    else head = conn->next;
    if (conn->next) conn->next->previous = conn->previous;
    else tail = conn->previous;
}

void conn_let_user_go(struct conn *conn) {
    const struct conn_user *user = conn->user;
    conn->user = NULL;
    if (user) user->gone(conn);
}

bool conn_run_queue(const struct carrier *carrier) {
    for (int packets = 0; head && packets < PACKETS_PER_TURN && carrier->can_send(); packets++) {
        struct conn *conn = head;
        conn_unqueue(conn);
        if (conn->carrier->turn(conn)) conn_queue(conn);
    }
    carrier->flush();
    return head && carrier->can_send();
}
