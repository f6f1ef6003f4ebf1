#include "sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* After sys/socket.h, which it needs. */
#include <linux/vm_sockets.h>

#include "loop.h"

#define CHUNK 65536u
#define READS_PER_TURN 16
#define MAX_CONNECTIONS 1024u

struct line {
    struct conn conn;
    struct watch watch;
    bool readable, writable, ended, hung_up;
    bool finishing; /* the user has closed it: send what is left, then close */
    uint8_t *unsent; /* what a write left over */
    size_t unsent_at, unsent_size;
    uint8_t *rest; /* received and not used yet */
    size_t rest_at, rest_size;
    struct line *next_ready, *previous_ready; /* among those that have something to take in */
    bool listed;
};

static const char *unix_directory;
static uint8_t out[CHUNK], in[CHUNK];
static unsigned lines;
static struct watch listener = {.fd = -1};
static bool acceptable;
static struct line *ready_head, *ready_tail;

static const struct carrier sockets;

static void list(struct line *line) {
    if (line->listed) return;
    line->listed = true;
    line->next_ready = NULL;
    line->previous_ready = ready_tail;
    if (ready_tail) ready_tail->next_ready = line;
    else ready_head = line;
    ready_tail = line;
}

static void unlist(struct line *line) {
    if (!line->listed) return;
    line->listed = false;
    if (line->previous_ready) line->previous_ready->next_ready = line->next_ready;
    else ready_head = line->next_ready;
    if (line->next_ready) line->next_ready->previous_ready = line->previous_ready;
    else ready_tail = line->previous_ready;
}

static void drop(struct line *line) {
    watch_drop(&line->watch);
    conn_unqueue(&line->conn);
    unlist(line);
    free_later(line->unsent);
    free_later(line->rest);
    free_later(line);
    lines--;
}

static void break_off(struct line *line) {
    const struct conn_user *user = line->conn.user;
    line->conn.user = NULL;
    if (user) user->gone(&line->conn);
    drop(line);
}

static void line_ready(struct watch *watch, uint32_t events) {
    struct line *line = CONTAINER(watch, struct line, watch);
    if (events & (EPOLLHUP | EPOLLERR)) line->hung_up = true;
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
        line->readable = true;
        list(line);
    }
    if (events & EPOLLOUT) {
        line->writable = true;
        conn_queue(&line->conn);
    }
}

static struct line *add(int fd) {
    struct line *line = must_alloc(sizeof *line);
    line->conn.carrier = &sockets;
    line->writable = true;
    lines++;
    watch_add(&line->watch, fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP, line_ready);
    return line;
}

/* --- sending --- */

/* How much of it went; less when it must wait. -1: the other side has gone. */
static ssize_t send_some(struct line *line, const uint8_t *bytes, size_t size) {
    size_t done = 0;
    while (done < size && line->writable) {
        ssize_t sent = send(line->watch.fd, bytes + done, size - done, MSG_NOSIGNAL);
        if (sent >= 0) done += (size_t)sent;
        else if (errno == EAGAIN) line->writable = false;
        else if (errno != EINTR) return -1;
    }
    return (ssize_t)done;
}

static size_t reserve(struct conn *conn, uint8_t **at) {
    struct line *line = (struct line *)conn;
    *at = out;
    return line->writable && !line->unsent_size ? CHUNK : 0;
}

static void commit(struct conn *conn, size_t size) {
    struct line *line = (struct line *)conn;
    ssize_t sent = send_some(line, out, size);
    if (sent < 0) {
        line->hung_up = line->readable = true;
        list(line);
        return;
    }
    if ((size_t)sent == size) return;
    line->unsent = must_alloc(CHUNK);
    line->unsent_at = 0;
    line->unsent_size = size - (size_t)sent;
    memcpy(line->unsent, out + sent, line->unsent_size);
}

static bool turn(struct conn *conn) {
    struct line *line = (struct line *)conn;
    if (line->unsent_size) {
        ssize_t sent = send_some(line, line->unsent + line->unsent_at, line->unsent_size);
        if (sent < 0) {
            break_off(line);
            return false;
        }
        line->unsent_at += (size_t)sent;
        line->unsent_size -= (size_t)sent;
        if (line->unsent_size) return false;
        free_later(line->unsent);
        line->unsent = NULL;
    }
    if (line->finishing) {
        /* The kernel delivers what was sent before it says that this end has closed. */
        shutdown(line->watch.fd, SHUT_RDWR);
        drop(line);
        return false;
    }
    return conn->user && line->writable && conn->user->pump(conn);
}

static void finish(struct conn *conn) {
    conn->user = NULL;
    ((struct line *)conn)->finishing = true;
    conn_queue(conn);
}

static void reset(struct conn *conn) {
    struct line *line = (struct line *)conn;
    conn->user = NULL;
    line->unsent_size = 0;
    finish(conn);
}

static bool can_send(void) { return true; }
static void flush(void) {}

/* --- receiving --- */

static size_t offer(struct line *line, const uint8_t *bytes, size_t size) {
    if (!line->conn.user) return size;
    size_t used = line->conn.user->input(&line->conn, bytes, size);
    return line->conn.user ? used : size;
}

static void resume(struct conn *conn) {
    struct line *line = (struct line *)conn;
    size_t used = offer(line, line->rest + line->rest_at, line->rest_size);
    line->rest_at += used;
    line->rest_size -= used;
    if (line->rest_size) return;
    free_later(line->rest);
    line->rest = NULL;
    list(line);
}

static void take_line(struct line *line) {
    /* What came before the end counts; but nobody would read answers to more of it. */
    if (line->hung_up && (line->rest_size || line->ended)) {
        break_off(line);
        return;
    }
    if (line->rest_size || !line->readable || line->ended) return;
    ssize_t got = recv(line->watch.fd, in, sizeof in, 0);
    if (got < 0 && errno == EAGAIN) {
        line->readable = false;
        return;
    }
    if (got <= 0) {
        if (got < 0 && errno != EINTR) line->hung_up = line->ended = true;
        if (got == 0) line->ended = true; /* it may still read; closing altogether hangs up */
        list(line);
        return;
    }
    size_t used = offer(line, in, (size_t)got);
    if (used == (size_t)got) {
        list(line);
        return;
    }
    line->rest = must_alloc(CHUNK);
    line->rest_at = 0;
    line->rest_size = (size_t)got - used;
    memcpy(line->rest, in + used, line->rest_size);
}

static bool from_host(int fd) {
    if (unix_directory) return true;
    struct sockaddr_vm address;
    socklen_t size = sizeof address;
    return !getpeername(fd, (struct sockaddr *)&address, &size) && address.svm_cid == VMADDR_CID_HOST;
}

static void take_connection(void) {
    int fd = accept4(listener.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (errno == EAGAIN) acceptable = false;
        return;
    }
    /* A program in the guest could dial its own machine's address. */
    if (lines >= MAX_CONNECTIONS || !from_host(fd)) {
        close(fd);
        return;
    }
    conn_accepted(&add(fd)->conn);
}

static bool take(void) {
    for (int reads = 0; reads < READS_PER_TURN && (ready_head || acceptable); reads++) {
        if (acceptable) take_connection();
        struct line *line = ready_head;
        if (!line) continue;
        unlist(line);
        take_line(line);
    }
    return ready_head || acceptable;
}

static void listener_ready(struct watch *watch, uint32_t events) {
    (void)watch, (void)events;
    acceptable = true;
}

/* --- addresses --- */

static socklen_t address_of(uint32_t port, unsigned cid, struct sockaddr_storage *storage) {
    memset(storage, 0, sizeof *storage);
    if (unix_directory) {
        struct sockaddr_un *address = (struct sockaddr_un *)storage;
        address->sun_family = AF_UNIX;
        snprintf(address->sun_path, sizeof address->sun_path, "%s/%u", unix_directory, port);
        return sizeof *address;
    }
    struct sockaddr_vm *address = (struct sockaddr_vm *)storage;
    address->svm_family = AF_VSOCK;
    address->svm_cid = cid;
    address->svm_port = port;
    return sizeof *address;
}

static int open_socket(int flags) {
    int family = unix_directory ? AF_UNIX : AF_VSOCK;
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd < 0) die("socket: %s", strerror(errno));
    return fd;
}

static struct conn *dial(uint32_t port) {
    struct sockaddr_storage address;
    socklen_t size = address_of(port, VMADDR_CID_HOST, &address);
    int fd = open_socket(0);
    if (connect(fd, (struct sockaddr *)&address, size)) {
        int error = errno;
        close(fd);
        errno = error;
        return NULL;
    }
    fcntl(fd, F_SETFL, O_NONBLOCK);
    return &add(fd)->conn;
}

static void listen_on(uint32_t port) {
    struct sockaddr_storage address;
    socklen_t size = address_of(port, VMADDR_CID_ANY, &address);
    int fd = open_socket(SOCK_NONBLOCK);
    if (bind(fd, (struct sockaddr *)&address, size) || listen(fd, 128))
        die("agent port: %s", strerror(errno));
    watch_add(&listener, fd, EPOLLIN, listener_ready);
}

static const struct carrier sockets = {
    .reserve = reserve, .commit = commit, .resume = resume, .finish = finish, .reset = reset,
    .turn = turn, .can_send = can_send, .flush = flush, .dial = dial, .listen = listen_on,
    .take = take,
};

const struct carrier *socket_carrier(const char *directory) {
    unix_directory = directory;
    return &sockets;
}
