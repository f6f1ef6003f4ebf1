/* The loop of the agent: one thread, one epoll descriptor, timers, and memory that outlives its
 * turn.
 *
 * A turn waits for events and calls each watch that has one, then the timers that are due, and
 * frees what was given to free_later. The agent then takes in from the carrier and lets connections
 * send (agent.c). Nothing in a turn blocks. Any call may end any connection, process or watch, its
 * own too: whoever is called tests `fd` before it goes on, and frees by free_later. */
#pragma once

#include <sys/epoll.h>

#include "core/util.h"

/* A descriptor that the loop looks at. Edge-triggered: who is called must use it up, or remember
 * that it has not. A call may be spurious. */
struct watch {
    int fd; /* -1: none */
    void (*ready)(struct watch *watch, uint32_t events);
};

/* Begin to watch. The watch owns the descriptor from now on. */
void watch_add(struct watch *watch, int fd, uint32_t events,
               void (*ready)(struct watch *, uint32_t));

/* Begin to watch with a call in every turn until the descriptor is used up. */
void watch_add_level(struct watch *watch, int fd, uint32_t events,
                     void (*ready)(struct watch *, uint32_t));

/* Look for these events from now on. Those that are there already are told in the next turn. */
void watch_change(struct watch *watch, uint32_t events);

/* Forget the descriptor and close it. Does nothing when there is none. */
void watch_drop(struct watch *watch);

/* Forget the descriptor and hand it to the caller. */
int watch_release(struct watch *watch);

struct timer {
    uint64_t at_ns; /* on CLOCK_MONOTONIC; 0: not set */
    void (*fire)(struct timer *timer);
    struct timer *next;
};

/* Set a timer, which may be set already. A time that has passed fires at the end of this turn. */
void timer_set(struct timer *timer, uint64_t at_ns, void (*fire)(struct timer *));
void timer_clear(struct timer *timer);

/* Free memory at the end of this turn, when no event of it can be under way any more. */
void free_later(void *memory);

/* Open the loop. Once, at the start. */
void loop_init(void);

/* Run one turn. It waits for an event or a timer, unless there is work at hand. */
void loop_turn(bool work_at_hand);
