#include "network/lo.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_addr.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bpf/flow.h"
#include "core/util.h"

#define LO 1 /* index: it is the first device of a network namespace */
#define ROOM 128

struct message {
    struct nlmsghdr header;
    uint8_t body[ROOM];
};

static void begin(struct message *message, uint16_t type, const void *body, size_t size) {
    memset(message, 0, sizeof *message);
    message->header.nlmsg_len = (uint32_t)NLMSG_LENGTH(size);
    message->header.nlmsg_type = type;
    message->header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    memcpy(message->body, body, size);
}

static void add(struct message *message, uint16_t type, const void *value, size_t size) {
    struct rtattr attribute = {.rta_len = (uint16_t)RTA_LENGTH(size), .rta_type = type};
    uint8_t *at = (uint8_t *)message + NLMSG_ALIGN(message->header.nlmsg_len);
    memcpy(at, &attribute, sizeof attribute);
    memcpy(at + RTA_LENGTH(0), value, size);
    message->header.nlmsg_len =
        (uint32_t)(NLMSG_ALIGN(message->header.nlmsg_len) + RTA_LENGTH(size));
}

/* Send a message to the kernel, and read its answer. 0, or -1 with errno. */
static int ask(int fd, const struct message *message) {
    struct {
        struct nlmsghdr header;
        struct nlmsgerr error;
        uint8_t rest[ROOM]; /* of the message, which an error brings back */
    } answer;
    if (send(fd, message, message->header.nlmsg_len, 0) < 0) return -1;
    ssize_t got = recv(fd, &answer, sizeof answer, 0);
    if (got < (ssize_t)(sizeof answer.header + sizeof answer.error)) return -1;
    errno = -answer.error.error;
    return errno ? -1 : 0;
}

static int add_address(int fd, uint8_t family, const void *address, size_t size) {
    struct message message;
    struct ifaddrmsg body = {
        .ifa_family = family,
        .ifa_prefixlen = (uint8_t)(8 * size),
        .ifa_flags = family == AF_INET6 ? IFA_F_NODAD : 0,
        .ifa_index = LO,
    };
    begin(&message, RTM_NEWADDR, &body, sizeof body);
    add(&message, IFA_LOCAL, address, size);
    add(&message, IFA_ADDRESS, address, size);
    return ask(fd, &message);
}

/* Make a whole prefix this machine's, as 127.0.0.0/8 is without asking. */
static int add_local_route(int fd, const void *prefix, uint8_t bits) {
    struct message message;
    uint32_t device = LO;
    struct rtmsg body = {
        .rtm_family = AF_INET6,
        .rtm_dst_len = bits,
        .rtm_table = RT_TABLE_LOCAL,
        .rtm_protocol = RTPROT_STATIC,
        .rtm_scope = RT_SCOPE_HOST,
        .rtm_type = RTN_LOCAL,
    };
    begin(&message, RTM_NEWROUTE, &body, sizeof body);
    add(&message, RTA_DST, prefix, 16);
    add(&message, RTA_OIF, &device, sizeof device);
    return ask(fd, &message);
}

bool lo_configure(bool *ip6) {
    const uint32_t own4 = htonl(OWN_IP4);
    const uint32_t own6[4] = {htonl(FLOW_IP6_0), 0, 0, htonl(OWN_IP6_LAST)};
    const uint32_t flows6[4] = {htonl(FLOW_IP6_0), htonl(FLOW_IP6_1), 0, 0};
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    bool ip4 = fd >= 0 && !add_address(fd, AF_INET, &own4, sizeof own4);
    if (!ip4) say("no connections to the outside: lo: %s", strerror(errno));
    *ip6 = ip4 && !add_address(fd, AF_INET6, own6, sizeof own6) && !add_local_route(fd, flows6, 96);
    if (ip4 && !*ip6) say("no IPv6 to the outside: lo: %s", strerror(errno));
    if (fd >= 0) close(fd);
    return ip4;
}
