/* A guest's program that means harm to who serves the network.
 *
 * flood connect COUNT ADDRESS PORT  opens that many connections, sends on each and never reads
 * flood datagrams COUNT ADDRESS     sends to that many ports in turn, from many sockets
 * flood garbage COUNT PORT          connects and sends to this port of all of loopback's addresses
 *
 * It prints how many times it did that and how many of them failed at once.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define SOCKETS 300 /* that datagrams come from */
#define OPEN 64     /* connections of garbage at once */

static uint64_t state = 88172645463325252u;
static char noise[4096];

static uint32_t anything(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}

static int sent_by(int type, in_addr_t address, int port, size_t size) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, type | SOCK_NONBLOCK, 0);
    to.sin_addr.s_addr = address;
    if (fd < 0) return -1;
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0) {
        struct pollfd poll_fd = {.fd = fd, .events = POLLOUT};
        if (errno != EINPROGRESS) {
            close(fd);
            return -1;
        }
        poll(&poll_fd, 1, 1);
    }
    send(fd, noise, size, MSG_NOSIGNAL);
    return fd;
}

int main(int argc, char **argv) {
    struct rlimit files = {1 << 20, 1 << 20};
    long done = 0, failed = 0, count = argc > 3 ? atol(argv[2]) : 0;
    for (size_t i = 0; i < sizeof noise; i++) noise[i] = (char)anything();
    if (setrlimit(RLIMIT_NOFILE, &files) < 0 || count <= 0) return 1;
    if (!strcmp(argv[1], "connect") && argc == 5) {
        for (; done < count; done++)
            failed += sent_by(SOCK_STREAM, inet_addr(argv[3]), atoi(argv[4]), sizeof noise) < 0;
    } else if (!strcmp(argv[1], "datagrams")) {
        static int fds[SOCKETS];
        for (int i = 0; i < SOCKETS; i++) fds[i] = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
        for (; done < count; done++) {
            struct sockaddr_in to = {.sin_family = AF_INET};
            to.sin_addr.s_addr = inet_addr(argv[3]);
            to.sin_port = htons(1 + done % 65535);
            failed += sendto(fds[done % SOCKETS], noise, anything() % sizeof noise, 0,
                             (struct sockaddr *)&to, sizeof to) < 0;
        }
    } else if (!strcmp(argv[1], "garbage")) {
        int fds[OPEN];
        memset(fds, -1, sizeof fds);
        for (; done < count; done++) {
            int *fd = &fds[done % OPEN];
            in_addr_t address = htonl(0x7f000000u | anything() >> (done % 2 ? 8 : 12));
            if (done % 8 == 0) address = htonl(0x7f400000u | anything() >> 10);
            if (*fd >= 0) close(*fd);
            *fd = sent_by(done % 4 == 3 ? SOCK_DGRAM : SOCK_STREAM, address, atoi(argv[3]),
                          anything() % sizeof noise);
            failed += *fd < 0;
        }
    } else {
        return 1;
    }
    printf("%ld %ld\n", done, failed);
    fflush(stdout);
    /* The connections stay until somebody has seen what they cost. */
    getchar();
    return 0;
}
