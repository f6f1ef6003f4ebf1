#include "system/users.h"

#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Read a number that is decimal digits and nothing else. */
static bool number(const char *text, uint32_t *value) {
    if (!*text || strspn(text, "0123456789") != strlen(text)) return false;
    errno = 0;
    unsigned long long wide = strtoull(text, NULL, 10);
    if (errno || wide >= UINT32_MAX) return false; /* all ones: "none" to the kernel */
    *value = (uint32_t)wide;
    return true;
}

static bool find_user(const char *wanted, struct identity *identity, char *name, size_t name_size) {
    uint32_t uid = 0;
    bool numeric = number(wanted, &uid), found = false;
    FILE *file = fopen("/etc/passwd", "re");
    struct passwd *entry;
    while (file && !found && (entry = fgetpwent(file))) {
        if (strcmp(entry->pw_name, wanted) && !(numeric && entry->pw_uid == uid)) continue;
        found = true;
        identity->uid = entry->pw_uid;
        identity->gid = entry->pw_gid;
        snprintf(identity->home, sizeof identity->home, "%s", entry->pw_dir);
        snprintf(name, name_size, "%s", entry->pw_name);
    }
    if (file) fclose(file);
    if (!found && numeric) identity->uid = uid;
    return found || numeric;
}

static bool find_group(const char *wanted, gid_t *gid) {
    uint32_t number_gid = 0;
    bool numeric = number(wanted, &number_gid), found = false;
    FILE *file = fopen("/etc/group", "re");
    struct group *entry;
    while (file && !found && (entry = fgetgrent(file))) {
        if (strcmp(entry->gr_name, wanted) && !(numeric && entry->gr_gid == number_gid)) continue;
        found = true;
        *gid = entry->gr_gid;
    }
    if (file) fclose(file);
    if (!found && numeric) *gid = number_gid;
    return found || numeric;
}

static void find_memberships(const char *name, struct identity *identity) {
    FILE *file = fopen("/etc/group", "re");
    struct group *entry;
    while (file && identity->group_count < MAX_GROUPS && (entry = fgetgrent(file)))
        for (char **member = entry->gr_mem; *member; member++)
            if (!strcmp(*member, name)) {
                identity->groups[identity->group_count++] = entry->gr_gid;
                break;
            }
    if (file) fclose(file);
}

int find_identity(const char *user, struct identity *identity, char *message, size_t message_size) {
    char name[256] = "", found_name[256] = "";
    memset(identity, 0, sizeof *identity);
    strcpy(identity->home, "/");
    const char *colon = strchr(user, ':');
    size_t name_size = colon ? (size_t)(colon - user) : strlen(user);
    if (name_size >= sizeof name) {
        snprintf(message, message_size, "user name too long");
        return ENAMETOOLONG;
    }
    memcpy(name, name_size ? user : "0", name_size ? name_size : 1);
    if (!find_user(name, identity, found_name, sizeof found_name)) {
        snprintf(message, message_size, "no such user: %s", name);
        return ENOENT;
    }
    if (colon && colon[1]) {
        if (find_group(colon + 1, &identity->gid)) return 0;
        snprintf(message, message_size, "no such group: %.200s", colon + 1);
        return ENOENT;
    }
    if (*found_name) find_memberships(found_name, identity);
    return 0;
}
