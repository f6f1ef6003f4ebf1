/* The end of the machine. */
#pragma once

#include "core/session.h"

_Noreturn void power_off(void);

/* The image's stop signal to the workload, SIGTERM to everything else; when all have ended, at the
 * latest after this time, OK with ALL_IS_WRITTEN, and soon after it power_off. Once is enough:
 * another session's OK comes at once. */
void shut_down(struct session *session, uint32_t grace_ms);
void shut_down_forget(struct session *session);
