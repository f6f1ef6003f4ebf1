#include "network/listeners.h"

#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "core/loop.h"

#define LOOK_MS 20u
#define LISTEN 0x0A      /* TCP_LISTEN, in the kernel's tables */
#define UNCONNECTED 0x07 /* TCP_CLOSE, which they have for UDP */
#define MAX_OWN 8

struct waiter {
    struct session *session;
    uint64_t until_ns;
    uint32_t port;
    struct waiter *next;
};

/* A line of a table. */
struct entry {
    uint32_t address[4]; /* in network order; IPv4 has the first word only */
    uint32_t port;
    unsigned state;
    unsigned long inode;
};

/* A search: what is looked for, and which of those found was made first. */
struct search {
    uint32_t port; /* 0: any */
    int family;    /* of what was found; 0: nothing was */
    struct entry found;
    uint8_t *ports; /* NULL, or a bit for each port that was found */
};

static struct waiter *waiters;
static struct timer next_look;
static unsigned long own[MAX_OWN];
static size_t own_count;
static uint32_t first_port; /* port that was the first when it was last asked for; 0: none */

void listeners_own(int fd) {
    struct stat status;
    if (own_count < MAX_OWN && !fstat(fd, &status)) own[own_count++] = status.st_ino;
}

static bool is_own(unsigned long inode) {
    for (size_t i = 0; i < own_count; i++)
        if (own[i] == inode) return true;
    return false;
}

static bool read_entry(const char *line, struct entry *entry) {
    char address[33];
    if (sscanf(line, " %*u: %32[0-9A-F]:%x %*[0-9A-F]:%*x %x %*x:%*x %*x:%*x %*x %*u %*u %lu",
               address, &entry->port, &entry->state, &entry->inode) != 4)
        return false;
    for (size_t word = 0; word < 4; word++) {
        char digits[9] = "";
        if (strlen(address) >= 8 * (word + 1)) memcpy(digits, address + 8 * word, 8);
        entry->address[word] = (uint32_t)strtoul(digits, NULL, 16);
    }
    return true;
}

/* Search one table. Of several sockets the one with the lowest inode is the first: the kernel
 * numbers them as they are made, though each processor from a block of its own. Those that listen
 * stand before all others, so that many connections cost nothing. */
static void search_in(struct search *search, const char *table, int family, unsigned state) {
    FILE *file = fopen(table, "re");
    char line[512];
    struct entry entry;
    if (!file) return;
    if (fgets(line, sizeof line, file)) /* the heading */
        while (fgets(line, sizeof line, file) && read_entry(line, &entry)) {
            if (entry.state != state && state == LISTEN) break;
            if (entry.state != state || is_own(entry.inode)) continue;
            if (search->ports) search->ports[entry.port / 8 % 8192] |= 1u << entry.port % 8;
            if (search->port && search->port != entry.port) continue;
            if (search->family && search->found.inode < entry.inode) continue;
            search->family = family;
            search->found = entry;
        }
    fclose(file);
}

static void search_tcp(struct search *search) {
    search_in(search, "/proc/net/tcp", AF_INET, LISTEN);
    search_in(search, "/proc/net/tcp6", AF_INET6, LISTEN);
}

/* Search for the first of all ports. The one that was the first stays it: numbers are in order for
 * sockets of one processor only. */
static void search_first(struct search *search) {
    if (first_port) {
        struct search known = *search;
        known.port = first_port;
        search_tcp(&known);
        if (known.family) {
            *search = known;
            return;
        }
    }
    search_tcp(search);
    first_port = search->family ? search->found.port : 0;
}

static void place_of(const struct search *search, struct sockaddr_storage *place) {
    static const uint32_t none[4];
    const struct entry *entry = &search->found;
    bool anywhere = !memcmp(entry->address, none, sizeof none);
    memset(place, 0, sizeof *place);
    if (search->family == AF_INET) {
        struct sockaddr_in *ip4 = (struct sockaddr_in *)place;
        ip4->sin_family = AF_INET;
        ip4->sin_port = htons((uint16_t)entry->port);
        ip4->sin_addr.s_addr = anywhere ? htonl(INADDR_LOOPBACK) : entry->address[0];
    } else {
        struct sockaddr_in6 *ip6 = (struct sockaddr_in6 *)place;
        ip6->sin6_family = AF_INET6;
        ip6->sin6_port = htons((uint16_t)entry->port);
        if (anywhere) ip6->sin6_addr = in6addr_loopback;
        else memcpy(&ip6->sin6_addr, entry->address, sizeof entry->address);
    }
}

bool listeners_find(uint32_t protocol, uint32_t *port, struct sockaddr_storage *place) {
    struct search search = {.port = *port};
    if (protocol == IPPROTO_TCP && *port) {
        search_tcp(&search);
    } else if (protocol == IPPROTO_TCP) {
        search_first(&search);
    } else {
        search_in(&search, "/proc/net/udp", AF_INET, UNCONNECTED);
        search_in(&search, "/proc/net/udp6", AF_INET6, UNCONNECTED);
    }
    if (!search.family) return false;
    *port = search.found.port;
    place_of(&search, place);
    return true;
}

/* --- waiting --- */

static void answer(struct session *session, uint32_t port) {
    session_send_ok(session, port);
    session_finish(session); /* listeners_forget is called by that */
}

static void look(struct timer *timer) {
    static uint8_t ports[8192];
    struct search search = {.ports = ports};
    uint64_t now = now_ns();
    (void)timer;
    memset(ports, 0, sizeof ports);
    search_first(&search);
    for (struct waiter *waiter = waiters, *next; waiter; waiter = next) {
        uint32_t port = waiter->port ? waiter->port : search.found.port;
        bool there = port && ports[port / 8] >> port % 8 & 1;
        next = waiter->next;
        if (there || waiter->until_ns <= now) answer(waiter->session, there ? port : 0);
    }
    if (waiters) timer_set(&next_look, now + LOOK_MS * NS_PER_MS, look);
}

void listeners_await(struct session *session, uint32_t timeout_ms, uint32_t port) {
    struct sockaddr_storage unused;
    bool there = listeners_find(IPPROTO_TCP, &port, &unused);
    if (there || !timeout_ms) {
        answer(session, there ? port : 0);
        return;
    }
    struct waiter *waiter = must_alloc(sizeof *waiter);
    uint64_t now = now_ns();
    waiter->session = session;
    waiter->until_ns = now + timeout_ms * NS_PER_MS;
    waiter->port = port;
    waiter->next = waiters;
    if (!waiters) timer_set(&next_look, now + LOOK_MS * NS_PER_MS, look);
    waiters = waiter;
}

void listeners_forget(struct session *session) {
    for (struct waiter **link = &waiters; *link; link = &(*link)->next)
        if ((*link)->session == session) {
            struct waiter *waiter = *link;
            *link = waiter->next;
            free(waiter);
            break;
        }
    if (!waiters) timer_clear(&next_look);
}
