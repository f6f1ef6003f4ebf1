/* Start a process in a cgroup. */
#pragma once

#include <sys/types.h>

/* Do as clone(function, stack_top, CLONE_VM | CLONE_VFORK | SIGCHLD, argument), but the child
 * begins its life in the cgroup of this directory. -1 with errno. */
pid_t clone_into_cgroup(int cgroup, int (*function)(void *), void *stack, size_t stack_size,
                        void *argument);
