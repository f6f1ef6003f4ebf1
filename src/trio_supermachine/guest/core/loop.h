/* The one loop of the agent: descriptors, timers, and memory that outlives its turn. */
#pragma once

#include <sys/epoll.h>

#include "core/util.h"

/* A descriptor that the loop looks at, edge-triggered: who is called must use it up, or
 * remember that it has not. A call may be spurious. */
struct watch {
    int fd; /* -1: none */
    void (*ready)(struct watch *watch, uint32_t events);
};

void watch_add(struct watch *watch, int fd, uint32_t events,
               void (*ready)(struct watch *, uint32_t));

/* The same for one that is called in every turn until it has used up the descriptor. */
void watch_add_level(struct watch *watch, int fd, uint32_t events,
                     void (*ready)(struct watch *, uint32_t));

/* Look for these events from now on, and tell which of them are there already. */
void watch_change(struct watch *watch, uint32_t events);

/* Forget the descriptor, and close it. Does nothing when there is none. */
void watch_drop(struct watch *watch);

/* Forget the descriptor, which the caller has from now on. */
int watch_release(struct watch *watch);

struct timer {
    uint64_t at_ns; /* on CLOCK_MONOTONIC; 0: not set */
    void (*fire)(struct timer *timer);
    struct timer *next;
};

void timer_set(struct timer *timer, uint64_t at_ns, void (*fire)(struct timer *));
void timer_clear(struct timer *timer);

/* Free memory at the end of this turn, when no event of it can be under way any more. */
void free_later(void *memory);

void loop_init(void);

/* One turn: wait, unless there is work at hand, and call whom it concerns. */
void loop_turn(bool work_at_hand);
