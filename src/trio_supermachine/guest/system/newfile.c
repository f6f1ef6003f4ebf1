#include "system/newfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int new_file_open(struct new_file *file, const char *path, unsigned mode) {
    static unsigned serial_number;
    const char *slash = strrchr(path, '/');
    int directory_size = slash ? (int)(slash - path) + 1 : 0;
    if (!path[directory_size]) {
        errno = *path ? EISDIR : ENOENT;
        return -1;
    }
    file->fd = -1;
    file->mode = mode & 07777;
    file->path = strdup(path);
    if (!file->path || asprintf(&file->temporary, "%.*s.tmp-supermachine-%d-%u", directory_size,
                                path, (int)getpid(), serial_number++) < 0) {
        free(file->path);
        errno = ENOMEM;
        return -1;
    }
    file->fd = open(file->temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file->fd >= 0) return 0;
    free(file->path);
    free(file->temporary);
    return -1;
}

int new_file_write(struct new_file *file, const uint8_t *bytes, size_t size) {
    while (size) {
        ssize_t written = write(file->fd, bytes, size);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) {
            int error = errno;
            new_file_discard(file);
            errno = error;
            return -1;
        }
        bytes += written;
        size -= (size_t)written;
    }
    return 0;
}

int new_file_publish(struct new_file *file, uid_t uid, gid_t gid) {
    bool owned = geteuid() != 0 || !fchown(file->fd, uid, gid);
    if (owned && !fchmod(file->fd, file->mode) && !rename(file->temporary, file->path)) {
        *file->temporary = 0; /* it has another name now */
        new_file_discard(file);
        return 0;
    }
    int error = errno;
    new_file_discard(file);
    errno = error;
    return -1;
}

void new_file_discard(struct new_file *file) {
    if (file->fd < 0) return;
    close(file->fd);
    file->fd = -1;
    if (*file->temporary) unlink(file->temporary);
    free(file->temporary);
    free(file->path);
}
