/* Events of the kernel about devices. */
#pragma once

#include "core/util.h"

/* Wait until `there` says that a device is there, for `ms` at the most. It is asked at once, and
 * after each event. Returns its last answer. */
bool wait_for_device(bool (*there)(void *argument), void *argument, unsigned ms);
