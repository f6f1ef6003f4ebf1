/* Measures virtio devices from inside a guest, as its init, and prints lines of "=NAME VALUE".
 * Environment, which is the kernel's command line: the MiB to move by streams and disk, and the
 * COUNT of single reads and round trips.
 * The peer of a stream, on the host: reads all MiB, answers a byte; is sent a byte, writes all MiB;
 * then sends back each byte. */
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MIB = 1 << 20, CHUNK = 1 << 16, PAGE = 4096, AT_ONCE = 8, PORT = 5000 };

static char *buffer;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3; /* microseconds */
}

static void die(const char *what) {
    printf("=failed %s: %s\n", what, strerror(errno));
    fflush(stdout);
    for (;;) pause();
}

static void load_modules(void) {
    FILE *order = fopen("/modules/order", "re");
    char name[256], path[300];
    if (!order) return;
    while (fgets(name, sizeof name, order)) {
        name[strcspn(name, "\n")] = 0;
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        syscall(SYS_finit_module, fd, "", 0);
        close(fd);
    }
    fclose(order);
}

static void read_pages(int fd, long count, unsigned seed, long pages) {
    for (long i = 0; i < count; i++) {
        seed = seed * 1103515245u + 12345u;
        if (pread(fd, buffer, PAGE, (off_t)((seed >> 8) % (unsigned)pages) * PAGE) != PAGE)
            die("random read");
    }
}

static void disk(const char *path, long mib, long count) {
    int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (fd < 0) return;
    double begin = now();
    for (long i = 0; i < mib; i++)
        if (pread(fd, buffer, MIB, i * MIB) != MIB) die("sequential read");
    printf("=sequential %f\n", mib * MIB / (now() - begin));
    begin = now();
    read_pages(fd, count, 1, mib * MIB / PAGE);
    printf("=random %f\n", (now() - begin) / count);
    fflush(stdout);
    begin = now();
    for (unsigned i = 0; i < AT_ONCE; i++)
        if (!fork()) {
            read_pages(fd, count / AT_ONCE, i, mib * MIB / PAGE);
            _exit(0);
        }
    while (wait(NULL) > 0) continue;
    printf("=random_%d %f\n", AT_ONCE, (now() - begin) / count);
    close(fd);
}

static void put(int fd, long left) {
    while (left > 0) {
        ssize_t done = write(fd, buffer, left < CHUNK ? left : CHUNK);
        if (done <= 0) die("write");
        left -= done;
    }
}

static void get(int fd, long left) {
    while (left > 0) {
        ssize_t done = read(fd, buffer, left < CHUNK ? left : CHUNK);
        if (done <= 0) die("read");
        left -= done;
    }
}

static void stream(const char *name, int fd, long mib, long count) {
    double begin = now();
    put(fd, mib * MIB);
    get(fd, 1);
    printf("=%s_out %f\n", name, mib * MIB / (now() - begin));
    begin = now();
    put(fd, 1);
    get(fd, mib * MIB);
    printf("=%s_in %f\n", name, mib * MIB / (now() - begin));
    begin = now();
    for (long i = 0; i < count; i++) {
        put(fd, 1);
        get(fd, 1);
    }
    printf("=%s_trip %f\n", name, (now() - begin) / count);
    close(fd);
}

static int dial(void) {
    struct sockaddr_vm host = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = PORT};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&host, sizeof host)) {
        close(fd);
        return -1;
    }
    return fd;
}

static int open_port(void) {
    for (int i = 0; i < 4; i++) {
        char path[32];
        snprintf(path, sizeof path, "/dev/vport%dp1", i);
        int fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd >= 0) return fd;
    }
    return -1;
}

static long option(const char *name) {
    const char *value = getenv(name);
    long number = value ? atol(value) : 0;
    if (number <= 0) die(name);
    return number;
}

int main(void) {
    long mib = option("MIB"), count = option("COUNT");
    mkdir("/dev", 0755);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    load_modules();
    if (posix_memalign((void **)&buffer, PAGE, MIB)) die("memory");
    memset(buffer, 0, MIB);
    disk("/dev/vda", mib, count);
    fflush(stdout);
    int fd = dial();
    if (fd >= 0) stream("vsock", fd, mib, count);
    fflush(stdout);
    fd = open_port();
    if (fd >= 0) stream("serial", fd, mib, count);
    printf("=end 0\n");
    fflush(stdout);
    for (;;) pause();
}
