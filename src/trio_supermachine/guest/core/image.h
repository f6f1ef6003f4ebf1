/* The image, as SETUP tells of it: every exec and the workload begin from this. */
#pragma once

struct image {
    const char *const *environment; /* NAME=value, up to NULL */
    const char *workdir;            /* absolute */
    const char *user;               /* as find_identity has it */
    int stop_signal;                /* for the workload at a shutdown */
};

/* An image that asks for nothing, until set-up. */
extern struct image image;
