/* Root in a guest who means harm: random accesses to the devices' registers and ports.
 *
 * hostile SEED ROUNDS WHAT: of WHAT (letters), b are writes to BARs, c to configuration spaces,
 * p to ports; m moves BARs about, onto each other; r takes drivers away and brings them back.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <unistd.h>

#define MOST 64
#define BAR 0x10
#define COMMAND 0x04

static struct {
    char name[32];
    int config;
    long size;
    volatile uint8_t *bar;
} devices[MOST];
static int count, ports;

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY);
    if (fd >= 0) {
        if (write(fd, text, strlen(text)) < 0) {
            /* such is life */
        }
        close(fd);
    }
}

static void drivers(const char *name, int bring) {
    char path[128];
    if (bring) {
        put("/sys/bus/pci/drivers_probe", name);
    } else {
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver/unbind", name);
        put(path, name);
    }
}

static void find(void) {
    DIR *directory = opendir("/sys/bus/pci/devices");
    struct dirent *entry;
    while (directory && (entry = readdir(directory)) && count < MOST) {
        char path[128];
        int fd;
        if (entry->d_name[0] == '.') continue;
        snprintf(devices[count].name, sizeof devices[count].name, "%.31s", entry->d_name);
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%.31s/config", entry->d_name);
        devices[count].config = open(path, O_RDWR);
        drivers(devices[count].name, 0);
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%.31s/resource0", entry->d_name);
        fd = open(path, O_RDWR | O_SYNC);
        if (fd >= 0) {
            long size = lseek(fd, 0, SEEK_END);
            void *bar = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            close(fd);
            if (size > 0 && bar != MAP_FAILED) {
                devices[count].bar = bar;
                devices[count].size = size;
            }
        }
        printf("%s: %ld bytes of registers\n", devices[count].name, devices[count].size);
        count++;
    }
}

static uint64_t value(void) {
    uint64_t random = (uint64_t)rand() << 33 ^ (uint64_t)rand() << 11 ^ rand();
    switch (rand() % 4) {
    case 0: return rand() % 16;
    case 1: return ~(uint64_t)(rand() % 4);
    case 2: return random & 0x0ffff000;
    default: return random;
    }
}

static void touch_bar(int i) {
    long offset;
    int size = 1 << rand() % 4;
    volatile uint8_t *at;
    if (!devices[i].bar) return;
    offset = rand() % 2 ? rand() % devices[i].size : rand() % 4 * 4096 + rand() % 64;
    if (offset + size > devices[i].size) return;
    if (rand() % 4) offset &= -size;
    if (offset + size > devices[i].size) return;
    at = devices[i].bar + offset;
    if (rand() % 2) {
        switch (size) {
        case 1: *at = value(); break;
        case 2: *(volatile uint16_t *)at = value(); break;
        case 4: *(volatile uint32_t *)at = value(); break;
        default: *(volatile uint64_t *)at = value();
        }
    } else {
        switch (size) {
        case 1: (void)*at; break;
        case 2: (void)*(volatile uint16_t *)at; break;
        case 4: (void)*(volatile uint32_t *)at; break;
        default: (void)*(volatile uint64_t *)at;
        }
    }
}

static void config_write(int i, long offset, const void *data, size_t size) {
    if (pwrite(devices[i].config, data, size, offset) < 0) return;
}

static void touch_config(int i) {
    uint64_t data = value();
    long offset = rand() % (rand() % 4 ? 256 : 4096);
    size_t size = 1 << rand() % 3;
    if (rand() % 4) offset &= -size;
    if (rand() % 2)
        config_write(i, offset, &data, size);
    else if (pread(devices[i].config, &data, size, offset) < 0)
        return;
}

static void move_bar(int i) {
    uint16_t on = 6;
    uint32_t bar[2];
    int other = rand() % count;
    if (pread(devices[other].config, bar, sizeof bar, BAR) != sizeof bar) return;
    if (rand() % 3 == 0) bar[0] ^= (uint32_t)(rand() % 64) << 14;
    if (rand() % 8 == 0) bar[1] = value();
    config_write(i, BAR, &bar[0], 4);
    config_write(i, BAR + 4, &bar[1], 4);
    config_write(i, COMMAND, &on, 2);
}

static void touch_port(void) {
    unsigned port = rand() % 2 ? 0x3f8 + rand() % 8 : (unsigned)rand() & 0xffff;
    if (!ports || port == 0x64 || (port >= 0x5fd && port <= 0x602) || port == 0xcf9) return;
    if (rand() % 2)
        switch (rand() % 3) {
        case 0: outb(value(), port); break;
        case 1: outw(value(), port); break;
        default: outl(value(), port);
        }
    else
        switch (rand() % 3) {
        case 0: inb(port); break;
        case 1: inw(port); break;
        default: inl(port);
        }
}

int main(int argc, char **argv) {
    long rounds;
    const char *what;
    if (argc != 4) return 2;
    srand(atoi(argv[1]));
    rounds = atol(argv[2]);
    what = argv[3];
    setvbuf(stdout, NULL, _IOLBF, 0);
    find();
    ports = iopl(3) == 0; /* a small kernel does not give them out */
    for (long round = 0; round < rounds; round++) {
        int i = rand() % count;
        switch (what[rand() % strlen(what)]) {
        case 'b': touch_bar(i); break;
        case 'c': touch_config(i); break;
        case 'm': move_bar(i); break;
        case 'p': touch_port(); break;
        case 'r': if (rand() % 100 == 0) drivers(devices[i].name, rand() % 2); break;
        }
    }
    puts("hostile: done");
    return 0;
}
