/* The freezer: stop all programs of the guest around a capture, and let them go on.
 *
 * Theory of operation
 *
 * A copy of a machine must not run a program before it has its own random numbers, clock and
 * identity. So no program may run at the capture. All that the agent starts begins in one cgroup
 * (`guest`), and a cgroup can be frozen whole. Programs of root may make cgroups beside it, as
 * container engines do; those are frozen, too. Init and the agent are in the root cgroup and go on.
 *
 * States: THAWED -> FREEZING at FREEZE -> FROZEN when all is frozen -> THAWED at THAW, at a
 * restore, at a shutdown, or when freezing fails or its session goes away. Cgroups are frozen one
 * after the other: one that is frozen makes no new ones, so that this comes to an end. `frozen` has
 * those that the freezer froze; a cgroup that the guest itself has frozen is left alone, and stays
 * so after the thaw.
 *
 * Nothing starts while the state is not THAWED: a process that is born frozen would never reach its
 * execve, and the agent, which waits for that (CLONE_VFORK), would hang. So each start asks
 * freezer_allows first. One that may not go enrols, and is called when the state is THAWED again,
 * in the order in which they came; an exec that ends meanwhile withdraws.
 *
 * Only the session that asked for FREEZE waits, and there is one at a time (EBUSY). PATIENCE_MS
 * bounds the wait: a process in the kernel freezes when it comes out, which a hostile program can
 * delay. At most MAX_CGROUPS are frozen; what a hostile root makes beyond them goes on, and so may
 * whatever root moves into the root cgroup: by that it harms its own copies only. */
#pragma once

#include "core/session.h"

/* Make the cgroup, once /sys/fs/cgroup is mounted. Without it nothing can be frozen. */
void freezer_open(void);

/* Return the cgroup that programs belong into; -1: there is none. */
int freezer_cgroup(void);

/* A program that is to start. Zero it before its first use. */
struct start_held {
    void (*start)(struct start_held *held); /* NULL: none waits */
    struct start_held *next;
};

/* Say whether programs may be started now. If not, `start` is called once they may. */
bool freezer_allows(struct start_held *held, void (*start)(struct start_held *held));

/* Do not call `start` any more. */
void freezer_withdraw(struct start_held *held);

/* Freeze all. The session gets OK when all is frozen, or ERROR and nothing is. */
void freezer_freeze(struct session *session);

/* Let all run again. A freeze that is under way fails. */
void freezer_thaw(void);

/* Kill all programs, and go back to THAWED: none has run since it was frozen. Return 0 when none is
 * left, or after PATIENCE_MS; or the error, and then all stay frozen. */
int freezer_kill(void);

/* Let all run again if this session waits for a freeze: it has gone. */
void freezer_forget(struct session *session);
