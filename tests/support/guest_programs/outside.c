/* A program that talks to the outside, and tells what it sees of it.
 *
 * outside tcp ADDRESS PORT TEXT       connect, send, end sending; tell both addresses and what came
 * outside mptcp ADDRESS PORT TEXT     the same by a socket of MPTCP
 * outside nonblocking ADDRESS PORT    the same, connecting as event loops do
 * outside refused ADDRESS PORT        connect, send, read, and tell what failed
 * outside hold ADDRESS PORT           the same, having read a byte, and said so
 * outside udp FAMILY ADDRESS...       one socket for all: send to each its own address from port 7
 * outside connected FAMILY ADDRESS... a connected socket for each, and back again; tell its addresses
 * outside inside ADDRESS              a server on it, and a client, both of which tell the addresses
 * outside deaf PORT                   listen, and take no connection
 * outside garbage                     talk to the agent's port as no hook would lead there
 * outside many COUNT ADDRESS PORT     as many connections at once; then use each
 * outside resolve NAME                what a resolver that looks for addresses of this machine finds
 * outside burst ADDRESS COUNT SIZE    datagrams as fast as can be; tell how many came back whole
 * outside ports COUNT ADDRESS         a datagram from that many sockets, and the answer to each
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define ECHO "7"

union address {
    struct sockaddr any;
    struct sockaddr_in ip4;
    struct sockaddr_in6 ip6;
};

static void fail(const char *what) {
    printf("%s: %s\n", what, strerror(errno));
    fflush(stdout);
    exit(1);
}

static int family_of(const char *text) {
    return strchr(text, ':') ? AF_INET6 : AF_INET;
}

static socklen_t parse(union address *address, const char *text, const char *port) {
    memset(address, 0, sizeof *address);
    if (family_of(text) == AF_INET) {
        address->ip4.sin_family = AF_INET;
        address->ip4.sin_port = htons((uint16_t)atoi(port));
        inet_pton(AF_INET, text, &address->ip4.sin_addr);
        return sizeof address->ip4;
    }
    address->ip6.sin6_family = AF_INET6;
    address->ip6.sin6_port = htons((uint16_t)atoi(port));
    inet_pton(AF_INET6, text, &address->ip6.sin6_addr);
    return sizeof address->ip6;
}

static void tell(const char *what, const union address *address) {
    char text[64];
    if (address->any.sa_family == AF_INET)
        printf("%s %s %d\n", what, inet_ntop(AF_INET, &address->ip4.sin_addr, text, sizeof text),
               ntohs(address->ip4.sin_port));
    else
        printf("%s %s %d\n", what, inet_ntop(AF_INET6, &address->ip6.sin6_addr, text, sizeof text),
               ntohs(address->ip6.sin6_port));
}

static void tell_peer(int fd) {
    union address address;
    socklen_t size = sizeof address;
    if (getpeername(fd, &address.any, &size)) fail("getpeername");
    tell("peer", &address);
}

static void tell_own(int fd) {
    union address address;
    socklen_t size = sizeof address;
    if (getsockname(fd, &address.any, &size)) fail("getsockname");
    address.ip4.sin_port = 0; /* at the same place in both */
    tell("own", &address);
}

static int connected_by(const char *text, const char *port, int type, int protocol) {
    union address address;
    socklen_t size = parse(&address, text, port);
    int fd = socket(address.any.sa_family, type, protocol);
    if (fd < 0) fail("socket");
    if (connect(fd, &address.any, size) && errno != EINPROGRESS) fail("connect");
    return fd;
}

static int connected(const char *text, const char *port, int type) {
    return connected_by(text, port, type, 0);
}

static void copy(int fd) {
    char bytes[4096];
    ssize_t got;
    fflush(stdout);
    while ((got = read(fd, bytes, sizeof bytes)) > 0)
        if (write(1, bytes, (size_t)got) < 0) fail("stdout");
    if (got < 0) fail("read");
}

static void tcp(int fd, const char *text) {
    tell_peer(fd);
    tell_own(fd);
    if (write(fd, text, strlen(text)) < 0) fail("write");
    shutdown(fd, SHUT_WR);
    copy(fd);
    close(fd);
}

static void nonblocking(const char *text, const char *port) {
    int fd = connected(text, port, SOCK_STREAM | SOCK_NONBLOCK), error;
    socklen_t size = sizeof error;
    struct pollfd event = {.fd = fd, .events = POLLOUT};
    poll(&event, 1, -1);
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
    printf("error %d\n", error);
    fcntl(fd, F_SETFL, 0);
    tcp(fd, "later");
}

static void refused(const char *text, const char *port, int hold) {
    int fd = connected(text, port, SOCK_STREAM);
    char byte = 'x';
    if (send(fd, &byte, 1, MSG_NOSIGNAL) < 0) fail("send");
    if (hold) {
        if (read(fd, &byte, 1) != 1) fail("first");
        puts("open");
        fflush(stdout);
    }
    if (read(fd, &byte, 1) < 0) fail("read");
    puts("read: end");
}

static void expect(int fd, const char *text) {
    union address from = {0};
    socklen_t size = sizeof from;
    char bytes[256];
    ssize_t got = recvfrom(fd, bytes, sizeof bytes, 0, &from.any, &size);
    if (got < 0) fail("recvfrom");
    tell("from", &from);
    printf("%s\n", got == (ssize_t)strlen(text) && !memcmp(bytes, text, (size_t)got) ? "same" : "other");
}

static void send_to(int fd, const char *text) {
    union address address;
    socklen_t size = parse(&address, text, ECHO);
    if (sendto(fd, text, strlen(text), 0, &address.any, size) < 0) fail("sendto");
}

static int socket_of(const char *family) {
    int fd = socket(*family == '4' ? AF_INET : AF_INET6, SOCK_DGRAM, 0);
    if (fd < 0) fail("socket");
    return fd;
}

static void unconnected_udp(const char *family, char **texts) {
    int fd = socket_of(family);
    for (; *texts; texts++) {
        send_to(fd, *texts);
        expect(fd, *texts);
    }
}

static void connected_udp(const char *family, char **texts) {
    int fd = socket_of(family);
    struct sockaddr nothing = {.sa_family = AF_UNSPEC};
    for (char **text = texts; *text; text++) {
        union address address;
        socklen_t size = parse(&address, *text, ECHO);
        if (connect(fd, &address.any, size)) fail("connect");
        tell_peer(fd);
        tell_own(fd);
        if (send(fd, *text, strlen(*text), 0) < 0) fail("send");
        expect(fd, *text);
        send_to(fd, *text); /* named, on a connected socket */
        expect(fd, *text);
        if (connect(fd, &nothing, sizeof nothing)) fail("disconnect");
    }
}

static void inside(const char *text) {
    union address address;
    socklen_t size = parse(&address, text, "0");
    int listener = socket(address.any.sa_family, SOCK_STREAM, 0);
    if (bind(listener, &address.any, size) || listen(listener, 1)) fail("listen");
    getsockname(listener, &address.any, &size);
    int client = socket(address.any.sa_family, SOCK_STREAM, 0);
    if (connect(client, &address.any, size)) fail("connect");
    int server = accept(listener, &address.any, &size);
    address.ip4.sin_port = 0;
    tell("client", &address);
    getpeername(client, &address.any, &size);
    address.ip4.sin_port = 0;
    tell("peer", &address);
    getsockname(client, &address.any, &size);
    address.ip4.sin_port = 0;
    tell("own", &address);
    int udp = socket(address.any.sa_family, SOCK_DGRAM, 0);
    getsockname(listener, &address.any, &size);
    if (bind(udp, &address.any, size)) fail("bind");
    if (sendto(udp, "x", 1, 0, &address.any, size) != 1) fail("sendto");
    union address from;
    size = sizeof from;
    char byte;
    if (recvfrom(udp, &byte, 1, 0, &from.any, &size) != 1) fail("recvfrom");
    from.ip4.sin_port = 0;
    tell("from", &from);
    close(server);
}

static void deaf(const char *port) {
    union address address;
    socklen_t size = parse(&address, "127.0.0.1", port);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, &address.any, size) || listen(listener, 4096)) fail("listen");
    pause();
}

static void garbage(void) {
    static const char *const places[] = {
        "127.0.0.1", "127.64.0.0", "127.100.1.2", "192.0.0.2", "::1", "fd73:6d00::2", "fd73:6d00:0:1::5",
    };
    char noise[2000];
    for (size_t i = 0; i < sizeof noise; i++) noise[i] = (char)(i * 7);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        union address address;
        socklen_t size = parse(&address, places[i], "61030");
        int fd = socket(address.any.sa_family, SOCK_STREAM, 0);
        char byte;
        int reset = connect(fd, &address.any, size) && errno == ECONNRESET; /* it may be that fast */
        send(fd, noise, sizeof noise, MSG_NOSIGNAL);
        reset |= read(fd, &byte, 1) < 0 && errno == ECONNRESET;
        printf("%s %s\n", places[i], reset ? "reset" : "not reset");
        close(fd);
        fd = connected(places[i], "61030", SOCK_DGRAM);
        for (int count = 0; count < 20; count++) send(fd, noise, (size_t)(count * 100), 0);
        close(fd);
    }
}

static void many(int count, const char *text, const char *port) {
    struct rlimit all = {(rlim_t)count + 16, 524288};
    setrlimit(RLIMIT_NOFILE, &all);
    int *fds = malloc(sizeof *fds * (size_t)count), wrong = 0;
    for (int i = 0; i < count; i++) fds[i] = connected(text, port, SOCK_STREAM | SOCK_NONBLOCK);
    for (int i = 0; i < count; i++) {
        struct pollfd event = {.fd = fds[i], .events = POLLOUT};
        int said = i, heard = -1;
        poll(&event, 1, -1);
        fcntl(fds[i], F_SETFL, 0);
        if (write(fds[i], &said, sizeof said) != sizeof said) wrong++;
        else if (recv(fds[i], &heard, sizeof heard, MSG_WAITALL) != sizeof heard || heard != said)
            wrong++, printf("%d: %s\n", i, strerror(errno));
        close(fds[i]);
    }
    printf("wrong %d\n", wrong);
}

static void resolve(const char *name) {
    struct addrinfo hints = {.ai_flags = AI_ADDRCONFIG, .ai_socktype = SOCK_STREAM}, *found;
    int error = getaddrinfo(name, "80", &hints, &found);
    if (error) {
        printf("error %s\n", gai_strerror(error));
        return;
    }
    for (; found; found = found->ai_next) tell("found", (const union address *)found->ai_addr);
}

static void burst(const char *text, int count, int size) {
    int fd = connected(text, ECHO, SOCK_DGRAM), whole = 0;
    unsigned char *bytes = malloc(65536);
    for (int i = 0; i < count; i++) {
        memset(bytes, i, (size_t)size);
        if (send(fd, bytes, (size_t)size, 0) < 0) fail("send");
        struct pollfd event = {.fd = fd, .events = POLLIN};
        while (poll(&event, 1, i == count - 1 ? 500 : 0) > 0) {
            ssize_t got = recv(fd, bytes, 65536, 0);
            int same = got == size;
            for (ssize_t at = 1; at < got; at++) same &= bytes[at] == bytes[0];
            if (!same) printf("not whole: %zd\n", got);
            whole += same;
        }
    }
    printf("%s\n", whole > 0 && whole <= count ? "some" : "wrong");
}

static void ports(int count, const char *text) {
    struct rlimit all = {(rlim_t)count + 16, 524288};
    setrlimit(RLIMIT_NOFILE, &all);
    int right = 0;
    for (int i = 0; i < count; i++) {
        int fd = connected(text, ECHO, SOCK_DGRAM), heard = -1;
        if (send(fd, &i, sizeof i, 0) < 0) fail("send");
        if (recv(fd, &heard, sizeof heard, 0) == sizeof heard && heard == i) right++;
    }
    printf("right %d\n", right);
}

int main(int count, char **words) {
    const char *what = count > 1 ? words[1] : "";
    if (!strcmp(what, "tcp") && count == 5) tcp(connected(words[2], words[3], SOCK_STREAM), words[4]);
    else if (!strcmp(what, "mptcp") && count == 5)
        tcp(connected_by(words[2], words[3], SOCK_STREAM, 262 /* IPPROTO_MPTCP */), words[4]);
    else if (!strcmp(what, "nonblocking") && count == 4) nonblocking(words[2], words[3]);
    else if (!strcmp(what, "refused") && count == 4) refused(words[2], words[3], 0);
    else if (!strcmp(what, "hold") && count == 4) refused(words[2], words[3], 1);
    else if (!strcmp(what, "udp") && count > 3) unconnected_udp(words[2], words + 3);
    else if (!strcmp(what, "connected") && count > 3) connected_udp(words[2], words + 3);
    else if (!strcmp(what, "inside") && count == 3) inside(words[2]);
    else if (!strcmp(what, "deaf") && count == 3) deaf(words[2]);
    else if (!strcmp(what, "garbage")) garbage();
    else if (!strcmp(what, "many") && count == 5) many(atoi(words[2]), words[3], words[4]);
    else if (!strcmp(what, "resolve") && count == 3) resolve(words[2]);
    else if (!strcmp(what, "burst") && count == 5) burst(words[2], atoi(words[3]), atoi(words[4]));
    else if (!strcmp(what, "ports") && count == 4) ports(atoi(words[2]), words[3]);
    else return 2;
    return 0;
}
