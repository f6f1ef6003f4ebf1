/* The end of the machine. */
#pragma once

#include "core/session.h"

/* End it at once. */
_Noreturn void power_off(void);

/* End it in order. The workload gets the image's stop signal, all other programs SIGTERM. When all
 * have ended, or after this time, the session gets OK with ALL_IS_WRITTEN, and soon after that the
 * machine powers off. A second call answers OK with 0 at once, and changes nothing. */
void shut_down(struct session *session, uint32_t grace_ms);

/* Forget this session, which has gone. The shutdown goes on. */
void shut_down_forget(struct session *session);
