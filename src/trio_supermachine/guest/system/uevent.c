#include "system/uevent.h"

#include <errno.h>
#include <linux/netlink.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

bool wait_for_device(bool (*there)(void *), void *argument, unsigned ms) {
    if (there(argument)) return true;
    uint64_t end = now_ns() + ms * NS_PER_MS;
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address))
        die("kernel events: %s", strerror(errno));
    bool found;
    while (!(found = there(argument))) {
        uint64_t now = now_ns();
        struct pollfd event = {.fd = fd, .events = POLLIN};
        if (now >= end || poll(&event, 1, (int)((end - now) / NS_PER_MS) + 1) == 0) break;
        char message[4096];
        while (recv(fd, message, sizeof message, 0) > 0) {
        }
    }
    close(fd);
    return found;
}
