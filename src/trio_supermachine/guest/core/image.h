/* The image as SETUP describes it. Every exec and the workload begin from this. */
#pragma once

struct image {
    const char *const *environment; /* NAME=value, up to NULL */
    const char *workdir;            /* absolute */
    const char *user;               /* as find_identity reads it */
    int stop_signal;                /* for the workload at a shutdown */
};

/* Before set-up: an empty environment, "/", root and SIGTERM. */
extern struct image image;
