#include "core/util.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void say_arguments(const char *format, va_list arguments) {
    /* Write a line at once: init, agent and workload share the console. */
    char line[512] = "supermachine: ";
    size_t used = strlen(line);
    int more = vsnprintf(line + used, sizeof line - used - 1, format, arguments);
    used = smaller(used + (size_t)(more > 0 ? more : 0), sizeof line - 2);
    line[used++] = '\n';
    ssize_t ignored = write(2, line, used);
    (void)ignored;
}

void say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    say_arguments(format, arguments);
    va_end(arguments);
}

void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    say_arguments(format, arguments);
    va_end(arguments);
    _exit(1);
}

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

void *must_alloc(size_t size) {
    void *memory = calloc(1, size);
    if (!memory) die("out of memory");
    return memory;
}

char *join_path(const char *dir, const char *name) {
    char *path;
    if (name[0] == '/') return strdup(name);
    const char *slash = dir[0] == '/' ? "" : "/";
    if (asprintf(&path, "%s%s/%s", slash, dir, name) < 0) return NULL;
    return path;
}

int write_text(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) return -1;
    size_t length = strlen(text);
    ssize_t written = write(fd, text, length);
    close(fd);
    return written == (ssize_t)length ? 0 : -1;
}

long read_text(const char *path, char *text, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    size_t used = 0;
    ssize_t got;
    while (used < size - 1 && (got = read(fd, text + used, size - 1 - used)) > 0)
        used += (size_t)got;
    close(fd);
    text[used] = 0;
    return (long)used;
}

int make_dirs(const char *path, unsigned mode) {
    char *copy = strdup(path);
    if (!copy) return -1;
    int result = 0;
    for (char *at = copy + 1;; at++) {
        if (*at != '/' && *at != 0) continue;
        char end = *at;
        *at = 0;
        result = mkdir(copy, mode);
        if (result && errno == EEXIST) result = 0;
        *at = end;
        if (result || !end) break;
    }
    free(copy);
    return result;
}
