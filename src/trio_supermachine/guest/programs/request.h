/* The request of an exec, as docs/wire.rst has it. */
#pragma once

#include "core/wire.h"

enum {
    EXEC_TERMINAL = 1,
    EXEC_STDIN = 2,
    EXEC_EXACT_ENVIRONMENT = 4,
    EXEC_NULL_STDOUT = 8,
    EXEC_NULL_STDERR = 16,
    EXEC_MERGE_STDERR = 32,
    EXEC_FLAGS = 63,
};

struct staged {
    const char *path;
    uint32_t mode;
    uint64_t size;
};

struct request {
    uint32_t flags, timeout_ms;
    uint16_t columns, rows;
    uint32_t window;
    const char *cwd, *user;
    const char **environment;
    const char ***chain; /* of argument lists */
    uint32_t chain_count;
    struct staged *files;
    uint32_t file_count;
};

/* Read a request into zeroed memory. The strings stay in the payload. False: it breaks the
 * protocol. Release it either way. */
bool request_read(struct request *request, struct reader *payload);
void request_release(struct request *request);
