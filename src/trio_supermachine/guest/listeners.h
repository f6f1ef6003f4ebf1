/* Which TCP port of the guest was listened on first. */
#pragma once

#include "session.h"

/* OK with the port to this session as soon as there is one, or with 0 after this time. */
void listeners_await(struct session *session, uint32_t timeout_ms);

/* This session does not wait any more. */
void listeners_forget(struct session *session);
