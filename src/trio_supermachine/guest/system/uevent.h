/* Wait for devices to appear, told by the kernel. */
#pragma once

#include "core/util.h"

/* Wait until `there` says so, at most `ms`. It is asked at once, and after each kernel event. */
bool wait_for_device(bool (*there)(void *argument), void *argument, unsigned ms);
