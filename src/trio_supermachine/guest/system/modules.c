#include "system/modules.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/machine.h"
#include "core/util.h"

#define MODULE_COMPRESSED_FILE 4 /* MODULE_INIT_COMPRESSED_FILE of linux/module.h */

static bool ends_with(const char *text, const char *end) {
    size_t size = strlen(text), end_size = strlen(end);
    return size >= end_size && !strcmp(text + size - end_size, end);
}

static void load(const char *name, const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int flags = ends_with(name, ".ko") ? 0 : MODULE_COMPRESSED_FILE;
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", flags) && errno != EEXIST))
        say("module %s: %s", name, strerror(errno));
    if (fd >= 0) close(fd);
}

void load_modules(void) {
    FILE *order = fopen("/modules/order", "re");
    if (!order) return;
    char name[256], path[300];
    bool vsock = channel_is("vsock");
    while (fgets(name, sizeof name, order)) {
        name[strcspn(name, "\n")] = 0;
        if (!*name) continue;
        snprintf(path, sizeof path, "/modules/%s", name);
        if (vsock || !strstr(name, "vsock")) load(name, path);
        unlink(path); /* give its memory back */
    }
    fclose(order);
}
