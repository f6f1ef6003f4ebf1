/* Everything that runs in the guest but init and the agent begins in one cgroup, which can be frozen,
 * as can those that programs make beside it: a copy of the machine then begins with nothing running
 * but what makes it a machine of its own. */
#pragma once

#include "session.h"

/* Make the cgroup, once /sys/fs/cgroup is there. Without it nothing freezes. */
void freezer_open(void);

/* Where programs belong; -1: nowhere in particular. */
int freezer_cgroup(void);

/* Whether programs must not be started now: one started in there would never say that it has been. */
bool freezer_holds(void);

/* OK to this session when all is frozen, or ERROR and nothing is. */
void freezer_freeze(struct session *session);

/* Let everything run again. */
void freezer_thaw(void);

/* This session does not wait any more. */
void freezer_forget(struct session *session);
