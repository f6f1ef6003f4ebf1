/* Users and groups, as the image's own /etc/passwd and /etc/group have them. */
#pragma once

#include <limits.h>
#include <sys/types.h>

#include "core/util.h"

#define MAX_GROUPS 256

struct identity {
    uid_t uid;
    gid_t gid;
    gid_t groups[MAX_GROUPS];
    size_t group_count;
    char home[PATH_MAX];
};

/* Look up `name|uid[:group|gid]` as Docker does. Empty is root. 0, or an errno with `message`. */
int find_identity(const char *user, struct identity *identity, char *message, size_t message_size);
