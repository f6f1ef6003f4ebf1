/* The end of the machine. */
#pragma once

#include "util.h"

/* In tests there is no machine to power off: the process kills what it started, and exits. */
extern bool machine_is_ours;

_Noreturn void power_off(void);

/* The stop signal to the workload, SIGTERM to everything else; power_off when all have ended,
 * at the latest after this time. Once is enough. */
void shut_down(uint32_t grace_ms, int stop_signal);
