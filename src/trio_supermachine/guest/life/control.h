/* The control actions: one frame asks, one answers, and the connection is closed. */
#pragma once

#include "core/session.h"

extern const struct action control_action;
