/* A file that appears whole or not at all: a temporary sibling, then a rename. */
#pragma once

#include <sys/types.h>

#include "core/util.h"

struct new_file {
    int fd; /* -1: none */
    char *path, *temporary;
    unsigned mode;
};

/* Open a file to write, write to it, and have it appear. 0, or -1 with errno and nothing left
 * behind. */
int new_file_open(struct new_file *file, const char *path, unsigned mode);
int new_file_write(struct new_file *file, const uint8_t *bytes, size_t size);
int new_file_publish(struct new_file *file, uid_t uid, gid_t gid);

/* Remove what was written, if it was not published. */
void new_file_discard(struct new_file *file);
