/* The small actions, those that one frame asks for and one answers. */
#pragma once

#include "core/session.h"

extern const struct action control_action;
