/* The small actions: PING, WORKLOAD_SIGNAL, WORKLOAD_WAIT, SET_CLOCK, SHUTDOWN. */
#pragma once

#include "session.h"

extern const struct action control_action;
