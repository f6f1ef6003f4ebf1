#include "system/rundir.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/util.h"

#define MAX_DEPTH 8
#define MAX_DIRECTORIES 1024

static int copied;

static void copy_directories(int from, int to, int depth) {
    DIR *directory = fdopendir(from);
    if (!directory) {
        close(from);
        return;
    }
    struct dirent *entry;
    while (depth < MAX_DEPTH && copied < MAX_DIRECTORIES && (entry = readdir(directory))) {
        const char *name = entry->d_name;
        struct stat status;
        if (!strcmp(name, ".") || !strcmp(name, "..")) continue;
        if (fstatat(dirfd(directory), name, &status, AT_SYMLINK_NOFOLLOW)) continue;
        if (!S_ISDIR(status.st_mode) || mkdirat(to, name, 0700)) continue;
        copied++;
        const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
        int below_to = openat(to, name, flags), below_from = openat(dirfd(directory), name, flags);
        if (below_to >= 0 && (fchown(below_to, status.st_uid, status.st_gid) ||
                              fchmod(below_to, status.st_mode & 07777)))
            say("/run/%s: %s", name, strerror(errno));
        if (below_to >= 0 && below_from >= 0) copy_directories(below_from, below_to, depth + 1);
        else if (below_from >= 0) close(below_from);
        if (below_to >= 0) close(below_to);
    }
    closedir(directory);
}

const char *mount_run(void) {
    struct stat status;
    if (!lstat("/run", &status) && !S_ISDIR(status.st_mode)) unlink("/run");
    if (mkdir("/run", 0755) && errno != EEXIST) return "/run";
    const int flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC;
    int from = open("/run", flags);
    if (from < 0 || mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755"))
        return "/run";
    int to = open("/run", flags);
    if (to < 0) return "/run";
    copy_directories(from, to, 0); /* closes `from` */
    if (mkdirat(to, "lock", 01777) == 0) fchmodat(to, "lock", 01777, 0);
    close(to);
    return NULL;
}
