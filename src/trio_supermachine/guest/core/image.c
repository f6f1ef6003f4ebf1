#include "core/image.h"

#include <signal.h>
#include <stddef.h>

struct image image = {
    .environment = (const char *const[]){NULL},
    .workdir = "/",
    .user = "",
    .stop_signal = SIGTERM,
};
