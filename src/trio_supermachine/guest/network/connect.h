/* The host's connections to what listens in this machine. */
#pragma once

#include "core/session.h"

extern const struct action connect_action;
