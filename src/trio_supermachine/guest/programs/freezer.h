/* Everything that runs in the guest but init and the agent begins in one cgroup, which can be
 * frozen, as can those that programs make beside it: a copy of the machine then begins with nothing
 * running but what makes it a machine of its own. */
#pragma once

#include "core/session.h"

/* Make the cgroup, once /sys/fs/cgroup is there. Without it nothing freezes. */
void freezer_open(void);

/* Where programs belong; -1: nowhere in particular. */
int freezer_cgroup(void);

/* A program that is to start. */
struct start_held {
    void (*start)(struct start_held *held); /* NULL: none waits */
    struct start_held *next;
};

/* Whether programs may be started now: one started in what is frozen would never say that it has
 * been. If not, `start` is called once they may. */
bool freezer_allows(struct start_held *held, void (*start)(struct start_held *held));

/* It need not start any more. */
void freezer_withdraw(struct start_held *held);

/* OK to this session when all is frozen, or ERROR and nothing is. */
void freezer_freeze(struct session *session);

/* Let everything run again. */
void freezer_thaw(void);

/* This session does not wait any more. */
void freezer_forget(struct session *session);
