/* What set-up told about the image: every exec begins from this. */
#pragma once

#include "util.h"

struct image {
    const char *const *environment;
    const char *workdir; /* absolute */
    const char *user;
};

extern struct image image;
