#include "system/mount.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "system/rundir.h"
#include "system/uevent.h"

#define MAX_LAYERS 120u
#define DEVICE_WAIT_MS 10000u

struct special {
    const char *type, *at;
    unsigned long flags;
    const char *options;
    bool optional;
};

static const struct special early[] = {
    {"proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, false},
    {"sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, false},
    {"devtmpfs", "/dev", MS_NOSUID, "mode=0755", false},
};

static const struct special late[] = {
    {"cgroup2", "/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, "nsdelegate", true},
    {"devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666", false},
    {"tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777", false},
    {"mqueue", "/dev/mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, true},
};

static const char *mount_special(const struct special *what, size_t count) {
    for (; count--; what++) {
        /* Make the directory. Below /proc and /sys the kernel has those that it supports. */
        struct stat status;
        if (!lstat(what->at, &status) && !S_ISDIR(status.st_mode)) unlink(what->at);
        if (mkdir(what->at, 0755) && errno != EEXIST && !what->optional) return what->at;
        if (mount(what->type, what->at, what->type, what->flags, what->options) && !what->optional)
            return what->at;
    }
    return NULL;
}

void mount_early(void) {
    const char *failed = mount_special(early, sizeof early / sizeof *early);
    if (failed) die("%s: %s", failed, strerror(errno));
}

/* Name a disk: vda to vdz, vdaa, and so on. */
static void disk_name(unsigned index, char *name, size_t size) {
    if (index < 26) snprintf(name, size, "/dev/vd%c", 'a' + index);
    else snprintf(name, size, "/dev/vd%c%c", 'a' + index / 26 - 1, 'a' + index % 26);
}

static bool exists(void *path) { return !access(path, F_OK); }

static const char *mount_layers(unsigned layers, char *options, size_t size) {
    static char device[16];
    char at[16];
    size_t used =
        (size_t)snprintf(options, size, "redirect_dir=on,upperdir=/w/u,workdir=/w/w,lowerdir=");
    if (mkdir("/l", 0755)) return "/l";
    for (unsigned layer = layers; layer--;) {
        disk_name(layer, device, sizeof device);
        snprintf(at, sizeof at, "/l/%u", layer);
        if (!wait_for_device(exists, device, DEVICE_WAIT_MS)) return device;
        if (mkdir(at, 0755)) return "/l";
        if (mount(device, at, "squashfs", MS_RDONLY, NULL)) return device;
        used += (size_t)snprintf(options + used, size - used, "%s%s", at, layer ? ":" : "");
    }
    return NULL;
}

static const char *mount_overlay(unsigned layers) {
    char options[4096];
    const char *failed = mount_layers(layers, options, sizeof options);
    if (failed) return failed;
    if (mkdir("/w", 0755) || mount("tmpfs", "/w", "tmpfs", 0, "mode=0755,size=80%") ||
        mkdir("/w/u", 0755) || mkdir("/w/w", 0755) || mkdir("/n", 0755))
        return "writable layer";
    if (mount("overlay", "/n", "overlay", 0, options)) return "overlay";
    return NULL;
}

static const char *enter_root(void) {
    umount2("/dev", MNT_DETACH);
    umount2("/sys", MNT_DETACH);
    umount2("/proc", MNT_DETACH);
    /* Move the mount, as switch_root does: pivot_root cannot leave an initramfs. */
    if (chdir("/n") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
        return "new root";
    return NULL;
}

static void link_devices(void) {
    static const char *const links[][2] = {
        {"/proc/self/fd", "/dev/fd"},
        {"/proc/self/fd/0", "/dev/stdin"},
        {"/proc/self/fd/1", "/dev/stdout"},
        {"/proc/self/fd/2", "/dev/stderr"},
    };
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (symlink(links[i][0], links[i][1]) && errno != EEXIST)
            say("%s: %s", links[i][1], strerror(errno));
}

const char *mount_root(unsigned layers) {
    if (!layers || layers > MAX_LAYERS) {
        errno = EINVAL;
        return "number of layers";
    }
    const char *failed = mount_overlay(layers);
    if (!failed) failed = enter_root();
    if (!failed) failed = mount_special(early, sizeof early / sizeof *early);
    if (!failed) failed = mount_special(late, sizeof late / sizeof *late);
    if (!failed) failed = mount_run();
    if (failed) return failed;
    link_devices();
    struct stat status;
    if (lstat("/tmp", &status) && !mkdir("/tmp", 01777)) chmod("/tmp", 01777);
    return NULL;
}
