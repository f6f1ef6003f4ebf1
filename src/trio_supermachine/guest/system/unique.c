#include "system/unique.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/random.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "system/newfile.h"

#define MACHINE_ID "/etc/machine-id"
#define DBUS_MACHINE_ID "/var/lib/dbus/machine-id"
#define BOOT_ID "/proc/sys/kernel/random/boot_id"

void add_entropy(const uint8_t *seed, uint32_t size) {
    struct rand_pool_info *pool = must_alloc(sizeof *pool + size);
    pool->entropy_count = (int)size * 8;
    pool->buf_size = (int)size;
    memcpy(pool->buf, seed, size);
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    /* Have it reseed now: a generator that runs already would do so after minutes only. */
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, pool) || ioctl(fd, RNDRESEEDCRNG))
        say("entropy: %s", strerror(errno));
    free(pool);
    if (fd >= 0) close(fd);
}

void set_clock(uint64_t realtime_ns) {
    struct timespec time = {
        .tv_sec = (time_t)(realtime_ns / NS_PER_S),
        .tv_nsec = (long)(realtime_ns % NS_PER_S),
    };
    if (clock_settime(CLOCK_REALTIME, &time)) say("clock: %s", strerror(errno));
}

void name_host(const char *hostname) {
    static char hosts[512]; /* as written here; any other content is the image's */
    char text[512];
    if (!*hostname) return;
    if (sethostname(hostname, strlen(hostname))) say("hostname: %s", strerror(errno));
    mkdir("/etc", 0755);
    snprintf(text, sizeof text, "%.64s\n", hostname);
    if (write_text("/etc/hostname", text)) say("/etc/hostname: %s", strerror(errno));
    if (read_text("/etc/hosts", text, sizeof text) > 0 && strcmp(text, hosts)) return;
    snprintf(hosts, sizeof hosts,
             "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t%.64s\n",
             hostname);
    if (write_text("/etc/hosts", hosts)) say("/etc/hosts: %s", strerror(errno));
}

/* --- machine id and boot id --- */

static bool is_hexadecimal(const char *text, size_t size) {
    return strspn(text, "0123456789abcdef") >= size;
}

bool is_machine_id(const char *text) { return strlen(text) == 32 && is_hexadecimal(text, 32); }

bool is_boot_id(const char *text) {
    static const size_t groups[] = {8, 4, 4, 4, 12};
    for (size_t i = 0; i < 5; i++) {
        if (!is_hexadecimal(text, groups[i])) return false;
        text += groups[i];
        if (i < 4 && *text++ != '-') return false;
    }
    return !*text;
}

/* Mount a file with this text over `path`, which cannot be replaced. `mounted`: one is there
 * already, and gives way. Returns a descriptor to write the text anew, or -1. */
static int cover(const char *path, const char *text, bool *mounted) {
    static const char source[] = "/run/.supermachine-cover";
    unlink(source);
    int fd = open(source, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
    if (fd < 0) return -1;
    if (write(fd, text, strlen(text)) == (ssize_t)strlen(text)) {
        if (*mounted) umount2(path, MNT_DETACH);
        *mounted = !mount(source, path, NULL, MS_BIND, NULL);
    }
    int error = errno;
    unlink(source);
    if (*mounted) return fd;
    close(fd);
    errno = error;
    return -1;
}

static int replace(const char *path, const char *text) {
    struct new_file file;
    if (new_file_open(&file, path, 0444)) return -1;
    if (new_file_write(&file, (const uint8_t *)text, strlen(text))) return -1;
    return new_file_publish(&file, 0, 0);
}

/* Follow symbolic links. Returns the path itself if nothing is there. */
static const char *behind(const char *path, char *real) {
    return realpath(path, real) ? real : strcpy(real, path);
}

/* Say whether a file may take this place. A link here leads nowhere: others were followed. */
static bool is_file_or_nothing(const char *path) {
    struct stat status;
    return lstat(path, &status) || S_ISREG(status.st_mode) || S_ISLNK(status.st_mode);
}

static void write_machine_id(const char *id) {
    static bool covered;
    char text[40], real[PATH_MAX], dbus[PATH_MAX];
    snprintf(text, sizeof text, "%s\n", id);
    mkdir("/etc", 0755);
    /* Cover it where it cannot be replaced, as systemd does. */
    if (is_file_or_nothing(behind(MACHINE_ID, real)) && (covered || replace(real, text))) {
        int fd = cover(real, text, &covered);
        if (fd < 0) say(MACHINE_ID ": %s", strerror(errno));
        else close(fd);
    }
    /* Replace the file of D-Bus, too, where it is no link, as on older systems. */
    if (access(DBUS_MACHINE_ID, F_OK) || !strcmp(behind(DBUS_MACHINE_ID, dbus), real)) return;
    if (is_file_or_nothing(dbus) && replace(dbus, text))
        say(DBUS_MACHINE_ID ": %s", strerror(errno));
}

void set_machine_id(const char *id) {
    char now[64];
    if (read_text(MACHINE_ID, now, sizeof now) > 0) {
        now[strcspn(now, "\n")] = 0;
        if (*now && strcmp(now, "uninitialized")) return;
    }
    write_machine_id(id);
}

/* --- renewal --- */

static int machine_id_file = -1, boot_id_file = -1;

/* Open the file, if all there is to do is to write 33 bytes over it. */
static int open_machine_id(void) {
    char now[64], real[PATH_MAX], dbus[PATH_MAX];
    if (read_text(MACHINE_ID, now, sizeof now) != 33 || !is_hexadecimal(now, 32)) return -1;
    behind(MACHINE_ID, real);
    if (!access(DBUS_MACHINE_ID, F_OK) && strcmp(behind(DBUS_MACHINE_ID, dbus), real)) return -1;
    return open(real, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
}

/* Mount a /proc that nothing covers, out of the way. Only if there is one does the kernel let a
 * user namespace mount its own: sandboxes of unprivileged users would not work in copies. */
static void keep_clean_proc(void) {
    static const char at[] = "/run/.supermachine-proc";
    mkdir(at, 0700);
    if (mount("proc", at, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL))
        say("%s: %s", at, strerror(errno));
}

static int cover_boot_id(void) {
    bool covered = false;
    char now[64];
    if (read_text(BOOT_ID, now, sizeof now) != 37) return -1;
    keep_clean_proc();
    return cover(BOOT_ID, now, &covered);
}

void prepare_renewal(void) {
    if (machine_id_file >= 0) close(machine_id_file);
    machine_id_file = open_machine_id();
    if (boot_id_file < 0) boot_id_file = cover_boot_id();
    if (boot_id_file < 0) say(BOOT_ID ": %s", strerror(errno));
}

static bool write_over(int fd, const char *id) {
    char text[40];
    int size = snprintf(text, sizeof text, "%s\n", id);
    return pwrite(fd, text, (size_t)size, 0) == size;
}

static bool is_linked(int fd) {
    struct stat status;
    return fd >= 0 && !fstat(fd, &status) && status.st_nlink;
}

void renew_identity(const char *machine_id, const char *boot_id) {
    /* Look whether the file is still in place: the host may have replaced it. */
    if (!is_linked(machine_id_file) || !write_over(machine_id_file, machine_id))
        write_machine_id(machine_id);
    if (boot_id_file < 0) boot_id_file = cover_boot_id();
    if (!write_over(boot_id_file, boot_id)) say(BOOT_ID ": %s", strerror(errno));
}
