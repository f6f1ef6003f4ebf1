/* Gets a page as programs of languages do that have no use for libc's resolver: its own DNS, over
 * UDP, and over TCP when the answer is truncated, and sockets that never block.
 *
 * fetch NAME            prints the protocol that the answer came by, and each IPv4 address in it
 * fetch NAME PORT PATH  prints the body of the page
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PATIENCE 20000 /* ms */
#define DNS 53
#define MOST 1024

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(2);
}

static void ready(int fd, short events, const char *what) {
    struct pollfd poll_fd = {.fd = fd, .events = events};
    int n = poll(&poll_fd, 1, PATIENCE);
    if (n == 0) errno = ETIMEDOUT;
    if (n != 1) fail(what);
}

static int dial(int type, struct in_addr address, int port) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = address};
    struct sockaddr_in peer, own;
    socklen_t size = sizeof peer;
    int error = 0, fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0) {
        if (errno != EINPROGRESS) fail("connect");
        ready(fd, POLLOUT, "connecting");
        size = sizeof error;
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if ((errno = error)) fail("connect");
    }
    size = sizeof peer;
    if (getpeername(fd, (struct sockaddr *)&peer, &size) < 0) fail("getpeername");
    size = sizeof own;
    if (getsockname(fd, (struct sockaddr *)&own, &size) < 0) fail("getsockname");
    if (peer.sin_addr.s_addr != address.s_addr || peer.sin_port != to.sin_port || !own.sin_port) {
        fprintf(stderr, "the peer is %s port %d\n", inet_ntoa(peer.sin_addr), ntohs(peer.sin_port));
        exit(3);
    }
    return fd;
}

static void put(int fd, const void *data, size_t size) {
    for (size_t sent = 0; sent < size;) {
        ready(fd, POLLOUT, "sending");
        ssize_t n = send(fd, (const char *)data + sent, size - sent, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) fail("send");
        if (n > 0) sent += n;
    }
}

/* As many bytes as there are, up to size; 0 at the end. */
static size_t get(int fd, void *data, size_t size) {
    for (;;) {
        ready(fd, POLLIN, "receiving");
        ssize_t n = recv(fd, data, size, 0);
        if (n >= 0) return n;
        if (errno != EAGAIN) fail("recv");
    }
}

static void get_all(int fd, unsigned char *data, size_t size) {
    for (size_t have = 0, n; have < size; have += n) {
        n = get(fd, data + have, size - have);
        if (n == 0) {
            fprintf(stderr, "the answer ends early\n");
            exit(2);
        }
    }
}

static struct in_addr nameserver(void) {
    char line[256], text[64];
    struct in_addr address;
    FILE *file = fopen("/etc/resolv.conf", "r");
    if (!file) fail("/etc/resolv.conf");
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "nameserver %63s", text) == 1 && inet_aton(text, &address)) return address;
    fprintf(stderr, "no nameserver\n");
    exit(2);
}

static size_t question(unsigned char *at, const char *name) {
    static const unsigned char header[] = {0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0};
    static const unsigned char type_and_class[] = {0, 1, 0, 1};
    unsigned char *start = at;
    memcpy(at, header, sizeof header);
    at += sizeof header;
    while (*name) {
        size_t length = strcspn(name, ".");
        *at++ = (unsigned char)length;
        memcpy(at, name, length);
        at += length;
        name += length + (name[length] == '.');
    }
    *at++ = 0;
    memcpy(at, type_and_class, sizeof type_and_class);
    return at + sizeof type_and_class - start;
}

static const unsigned char *past_name(const unsigned char *at, const unsigned char *end) {
    while (at < end && *at && *at < 0xc0) at += 1 + *at;
    return at + (at < end && *at ? 2 : 1);
}

static int resolve(const char *name, struct in_addr *found, const char **by) {
    unsigned char query[512], answer[65536], prefix[2];
    struct in_addr server = nameserver();
    size_t length = question(query, name), size;
    int count = 0, fd = dial(SOCK_DGRAM, server, DNS);
    *by = "udp";
    put(fd, query, length);
    size = get(fd, answer, sizeof answer);
    close(fd);
    if (size >= 12 && answer[2] & 2) {
        *by = "tcp";
        fd = dial(SOCK_STREAM, server, DNS);
        prefix[0] = (unsigned char)(length >> 8);
        prefix[1] = (unsigned char)length;
        put(fd, prefix, 2);
        put(fd, query, length);
        get_all(fd, prefix, 2);
        size = (size_t)prefix[0] << 8 | prefix[1];
        get_all(fd, answer, size);
        close(fd);
    }
    if (size < length || memcmp(answer, query, 2) || answer[3] & 15) {
        fprintf(stderr, "%s: %zu bytes, response code %d\n", name, size, answer[3] & 15);
        exit(4);
    }
    const unsigned char *at = answer + length, *end = answer + size;
    for (int left = answer[6] << 8 | answer[7]; left > 0; left--) {
        at = past_name(at, end);
        if (end - at < 10) break;
        int type = at[0] << 8 | at[1], data = at[8] << 8 | at[9];
        at += 10;
        if (end - at < data) break;
        if (type == 1 && data == 4 && count < MOST) memcpy(&found[count++], at, 4);
        at += data;
    }
    return count;
}

int main(int argc, char **argv) {
    static struct in_addr found[MOST];
    char page[4096];
    const char *by;
    int count, head = 1;
    if (argc != 2 && argc != 4) return 1;
    count = resolve(argv[1], found, &by);
    if (argc == 2) {
        puts(by);
        for (int i = 0; i < count; i++) puts(inet_ntoa(found[i]));
        return 0;
    }
    if (count == 0) return 4;
    int fd = dial(SOCK_STREAM, found[0], atoi(argv[2]));
    snprintf(page, sizeof page, "GET %s HTTP/1.0\r\nHost: %s\r\n\r\n", argv[3], argv[1]);
    put(fd, page, strlen(page));
    /* The body begins behind the first empty line. */
    for (int seen = 0; head && get(fd, page, 1) == 1;) {
        seen = page[0] == '\n' ? seen + 1 : page[0] == '\r' ? seen : 0;
        head = seen < 2;
    }
    for (size_t n; (n = get(fd, page, sizeof page));) fwrite(page, 1, n, stdout);
    return 0;
}
