#include "core/loop.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int epoll_fd;
static struct timer *first_timer; /* the earliest first */
static void **garbage;
static size_t garbage_count, garbage_size;

void loop_init(void) {
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0) die("epoll_create1: %s", strerror(errno));
}

static void control(struct watch *watch, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = watch};
    if (epoll_ctl(epoll_fd, operation, watch->fd, &event)) die("epoll_ctl: %s", strerror(errno));
}

void watch_add(struct watch *watch, int fd, uint32_t events,
               void (*ready)(struct watch *, uint32_t)) {
    watch_add_level(watch, fd, events | EPOLLET, ready);
}

void watch_add_level(struct watch *watch, int fd, uint32_t events,
                     void (*ready)(struct watch *, uint32_t)) {
    watch->fd = fd;
    watch->ready = ready;
    control(watch, EPOLL_CTL_ADD, events);
}

void watch_change(struct watch *watch, uint32_t events) {
    control(watch, EPOLL_CTL_MOD, events | EPOLLET);
}

int watch_release(struct watch *watch) {
    int fd = watch->fd;
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
    watch->fd = -1;
    return fd;
}

void watch_drop(struct watch *watch) {
    if (watch->fd < 0) return;
    /* Do not leave it to close: a program being started may hold the same open file. */
    close(watch_release(watch));
}

void timer_set(struct timer *timer, uint64_t at_ns, void (*fire)(struct timer *)) {
    timer_clear(timer);
    timer->at_ns = at_ns;
    timer->fire = fire;
    struct timer **link = &first_timer;
    while (*link && (*link)->at_ns <= at_ns) link = &(*link)->next;
    timer->next = *link;
    *link = timer;
}

void timer_clear(struct timer *timer) {
    if (!timer->at_ns) return;
    struct timer **link = &first_timer;
    while (*link != timer) link = &(*link)->next;
    *link = timer->next;
    timer->at_ns = 0;
}

void free_later(void *memory) {
    if (garbage_count == garbage_size) {
        garbage_size = garbage_size ? garbage_size * 2 : 64;
        garbage = realloc(garbage, garbage_size * sizeof *garbage);
        if (!garbage) die("out of memory");
    }
    garbage[garbage_count++] = memory;
}

static int wait_ms(bool work_at_hand) {
    if (work_at_hand) return 0;
    if (!first_timer) return -1;
    uint64_t now = now_ns();
    if (first_timer->at_ns <= now) return 0;
    uint64_t ms = (first_timer->at_ns - now + NS_PER_MS - 1) / NS_PER_MS;
    return ms > INT_MAX ? INT_MAX : (int)ms;
}

void loop_turn(bool work_at_hand) {
    struct epoll_event events[64];
    int count = epoll_wait(epoll_fd, events, 64, wait_ms(work_at_hand));
    if (count < 0 && errno != EINTR) die("epoll_wait: %s", strerror(errno));
    for (int i = 0; i < count; i++) {
        struct watch *watch = events[i].data.ptr;
        if (watch->fd >= 0) watch->ready(watch, events[i].events);
    }
    while (first_timer && first_timer->at_ns <= now_ns()) {
        struct timer *timer = first_timer;
        timer_clear(timer);
        timer->fire(timer);
    }
    while (garbage_count) free(garbage[--garbage_count]);
}
