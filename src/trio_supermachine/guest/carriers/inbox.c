#include "carriers/inbox.h"

#include <string.h>

#include "core/loop.h"

/* The user may let the connection go meanwhile: nobody wants the rest then. */
static size_t offer(struct conn *conn, const uint8_t *bytes, size_t size) {
    if (!conn->user) return size;
    size_t used = conn->user->input(conn, bytes, size);
    return conn->user ? used : size;
}

static void make_room(struct inbox *inbox, size_t size) {
    if (inbox->at + inbox->size + size <= inbox->room) return;
    if (inbox->at) memmove(inbox->kept, inbox->kept + inbox->at, inbox->size);
    inbox->at = 0;
    if (inbox->size + size <= inbox->room) return;
    size_t needed = inbox->size + size;
    size_t room = inbox->size ? smaller(2 * needed, inbox->bound) : needed;
    uint8_t *larger = must_alloc(room);
    if (inbox->size) memcpy(larger, inbox->kept, inbox->size);
    free_later(inbox->kept);
    inbox->kept = larger;
    inbox->room = room;
}

static void keep(struct inbox *inbox, const uint8_t *bytes, size_t size) {
    if (!size) return;
    make_room(inbox, size);
    memcpy(inbox->kept + inbox->at + inbox->size, bytes, size);
    inbox->size += size;
}

size_t inbox_take(struct inbox *inbox, struct conn *conn, const uint8_t *bytes, size_t size) {
    size_t used = inbox->size ? 0 : offer(conn, bytes, size);
    keep(inbox, bytes + used, size - used);
    return used;
}

size_t inbox_offer_again(struct inbox *inbox, struct conn *conn) {
    if (!inbox->size) return 0;
    size_t used = offer(conn, inbox->kept + inbox->at, inbox->size);
    inbox->at += used;
    inbox->size -= used;
    if (!inbox->size) inbox_release(inbox);
    return used;
}

bool inbox_tell_end(struct inbox *inbox, struct conn *conn) {
    const struct conn_user *user = conn->user;
    if (!user || !user->ended || inbox->size || !inbox->ended) return false;
    if (inbox->told) return true;
    inbox->told = true;
    user->ended(conn);
    return true;
}

void inbox_release(struct inbox *inbox) {
    free_later(inbox->kept);
    inbox->kept = NULL;
    inbox->at = inbox->size = inbox->room = 0;
}
