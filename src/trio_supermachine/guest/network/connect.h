/* The action CONNECT: a connection of the host to what listens in this machine.
 *
 * For TCP the places where a port may be reached are tried one after the other; the session is held
 * meanwhile, and a relay takes its connection over. For UDP the session goes on as udp.c has it. */
#pragma once

#include "core/session.h"

extern const struct action connect_action;
