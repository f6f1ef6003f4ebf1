/* Prints what there is below a directory, in an order and a form that do not depend on the machine:
 * one line for each file, with its name, type, mode, owner, device, link group, time, content and
 * extended attributes. What is mounted there is not entered. A static program, so that it runs in
 * any image. */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

static dev_t here;
static char path[1 << 16], value[1 << 17], names[1 << 17];

static void quote(const char *bytes, size_t size) {
    for (size_t i = 0; i < size; i++) {
        unsigned char byte = bytes[i];
        if (byte > ' ' && byte < 127 && byte != '\\')
            putchar(byte);
        else
            printf("\\%02x", byte);
    }
}

static uint64_t hash(int at, const char *name) {
    uint64_t sum = 14695981039346656037u; /* FNV-1a */
    int fd = openat(at, name, O_RDONLY | O_NOFOLLOW);
    if (fd < 0) err(1, "%s", path);
    for (ssize_t got; (got = read(fd, value, sizeof value));) {
        if (got < 0) err(1, "%s", path);
        for (ssize_t i = 0; i < got; i++) sum = (sum ^ (unsigned char)value[i]) * 1099511628211u;
    }
    close(fd);
    return sum;
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static void list_xattrs(const char *name) {
    ssize_t size = llistxattr(name, names, sizeof names);
    const char *found[4096];
    size_t count = 0;
    for (const char *at = names; at < names + size; at += strlen(at) + 1)
        if (count < 4096) found[count++] = at;
    qsort(found, count, sizeof *found, by_name);
    for (size_t i = 0; i < count; i++) {
        ssize_t got = lgetxattr(name, found[i], value, sizeof value);
        if (got < 0) err(1, "%s: %s", path, found[i]);
        putchar(' ');
        quote(found[i], strlen(found[i]));
        putchar('=');
        quote(value, got);
    }
}

static void list(int at, const char *name, size_t end) {
    struct stat status;
    if (fstatat(at, name, &status, AT_SYMLINK_NOFOLLOW)) err(1, "%s", path);
    quote(path, end);
    printf(" %o %u:%u %u:%u %ju:%ju*%ju %jd", status.st_mode, status.st_uid, status.st_gid,
           major(status.st_rdev), minor(status.st_rdev), (uintmax_t)status.st_dev,
           (uintmax_t)status.st_ino, S_ISDIR(status.st_mode) ? 0 : (uintmax_t)status.st_nlink,
           (intmax_t)status.st_mtime);
    char self[64];
    int fd = openat(at, name, O_PATH | O_NOFOLLOW);
    if (fd < 0) err(1, "%s", path);
    if (S_ISREG(status.st_mode)) {
        printf(" %jd:%016jx", (intmax_t)status.st_size, (uintmax_t)hash(at, name));
    } else if (S_ISLNK(status.st_mode)) {
        ssize_t got = readlinkat(at, name, value, sizeof value);
        putchar(' ');
        quote(value, got < 0 ? 0 : got);
    } else {
        printf(" -");
    }
    /* The name below a descriptor, since a path may be longer than the system takes. */
    snprintf(self, sizeof self, at == AT_FDCWD ? "./" : "/proc/self/fd/%d/", at);
    char *whole = NULL;
    if (asprintf(&whole, "%s%s", self, name) < 0) err(1, "memory");
    list_xattrs(whole);
    free(whole);
    putchar('\n');
    close(fd);
    if (at == AT_FDCWD) here = status.st_dev;
    if (!S_ISDIR(status.st_mode) || status.st_dev != here) return;
    struct dirent **entries;
    int below = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    int count = below < 0 ? -1 : scandirat(below, ".", &entries, NULL, NULL);
    if (count < 0) err(1, "%s", path);
    for (int i = 0; i < count; i++) {
        const char *entry = entries[i]->d_name;
        size_t length = strlen(entry);
        if (strcmp(entry, ".") && strcmp(entry, "..") && end + 1 + length < sizeof path) {
            path[end] = '/';
            memcpy(path + end + 1, entry, length + 1);
            list(below, entry, end + 1 + length);
            path[end] = 0;
        }
        free(entries[i]);
    }
    free(entries);
    close(below);
}

int main(int argc, char **argv) {
    if (argc != 2 || chdir(argv[1])) err(1, "usage: lister DIRECTORY");
    strcpy(path, ".");
    list(AT_FDCWD, ".", 1);
    return 0;
}
