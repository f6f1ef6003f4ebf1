#include "carriers/sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

/* After sys/socket.h, which it needs. */
#include <linux/vm_sockets.h>

#include "carriers/inbox.h"
#include "core/loop.h"
#include "core/wire.h"
#include "system/uevent.h"

/* Room for small frames and two of data: what one turn sends is one system call, and few packets
 * of AF_VSOCK. */
#define DATA_FRAME (FRAME_HEADER + MAX_DATA)
#define OUT_SIZE (4096u + 2 * DATA_FRAME)
#define IN_SIZE 131072u
#define PUMPS_PER_TURN 16
#define READS_PER_TURN 16
#define MAX_CONNECTIONS 4096u
#define CONNECT_TIMEOUT_S 10
#define TRANSPORT_WAIT_MS 10000u

struct line {
    struct conn conn;
    struct watch watch;
    bool readable, writable;
    bool asks_for_room; /* events tell when there is room to send */
    bool closing;       /* an event has told of an end; only reading tells when it comes */
    bool broken;        /* nothing can be sent */
    bool ending;        /* end sending after what is unsent */
    bool shut;          /* sending has ended */
    bool finishing;     /* close after what is unsent */
    bool rude;          /* do not wait for what is unsent */
    uint8_t *unsent;    /* what the socket did not take */
    size_t unsent_at, unsent_size;
    struct inbox inbox;
    struct line *next_ready, *previous_ready; /* in the list of those to read from */
    bool listed;
};

static const char *unix_directory;
static uint8_t out[OUT_SIZE], in[IN_SIZE];
static size_t out_size; /* of the line whose turn it is */
static unsigned lines;
static struct watch listener = {.fd = -1};
static bool acceptable;
static void (*accepted)(struct conn *conn);
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
    inbox_release(&line->inbox);
    free_later(line);
    lines--;
}

static void break_off(struct line *line) {
    conn_let_user_go(&line->conn);
    drop(line);
}

static void line_ready(struct watch *watch, uint32_t events) {
    struct line *line = CONTAINER(watch, struct line, watch);
    if (events & (EPOLLHUP | EPOLLERR)) line->broken = true;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) line->closing = true;
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
        line->readable = true;
        list(line);
    }
    if (events & EPOLLOUT) {
        line->writable = true;
        conn_queue(&line->conn);
    }
}

/* Ask for room to send only after there was none. Otherwise each packet that brings credit would
 * wake this process for nothing. */
static uint32_t events_of(const struct line *line) {
    return EPOLLIN | EPOLLRDHUP | (line->asks_for_room ? EPOLLOUT : 0);
}

static struct line *add(int fd, bool connected) {
    struct line *line = must_alloc(sizeof *line);
    line->conn.carrier = &sockets;
    line->writable = connected;
    line->asks_for_room = !connected;
    line->inbox.bound = IN_SIZE;
    lines++;
    watch_add(&line->watch, fd, events_of(line), line_ready);
    return line;
}

/* --- sending --- */

/* Give up sending. What came before the end is still read. */
static void lose(struct line *line) {
    line->broken = line->closing = line->readable = true;
    line->writable = false;
    line->unsent_size = 0;
    list(line);
}

static void wait_for_room(struct line *line) {
    line->writable = false;
    if (line->asks_for_room) return;
    line->asks_for_room = true;
    watch_change(&line->watch, events_of(line)); /* tells of room that has come meanwhile */
}

/* Send what goes now. Returns how much, or -1: the other side has gone. */
static ssize_t send_some(struct line *line, const uint8_t *bytes, size_t size) {
    size_t done = 0;
    while (done < size && line->writable) {
        ssize_t sent = send(line->watch.fd, bytes + done, size - done, MSG_NOSIGNAL);
        if (sent >= 0) done += (size_t)sent;
        else if (errno == EAGAIN) wait_for_room(line);
        else if (errno != EINTR) return -1;
    }
    return (ssize_t)done;
}

static size_t reserve(struct conn *conn, uint8_t **at) {
    (void)conn;
    *at = out + out_size;
    return OUT_SIZE - out_size;
}

static void commit(struct conn *conn, size_t size) {
    (void)conn;
    out_size += size;
}

static bool send_unsent(struct line *line) {
    ssize_t sent = send_some(line, line->unsent + line->unsent_at, line->unsent_size);
    if (sent < 0) {
        lose(line);
        return false;
    }
    line->unsent_at += (size_t)sent;
    line->unsent_size -= (size_t)sent;
    if (line->unsent_size) return false;
    free_later(line->unsent);
    line->unsent = NULL;
    return true;
}

static void send_out(struct line *line) {
    ssize_t sent = send_some(line, out, out_size);
    if (sent < 0) {
        lose(line);
    } else if ((size_t)sent < out_size) {
        line->unsent_at = 0;
        line->unsent_size = out_size - (size_t)sent;
        line->unsent = must_alloc(line->unsent_size);
        memcpy(line->unsent, out + sent, line->unsent_size);
    }
    out_size = 0;
}

static bool turn(struct conn *conn) {
    struct line *line = (struct line *)conn;
    if (line->rude) line->unsent_size = 0;
    if (line->unsent_size && !send_unsent(line)) return false;
    bool more = line->writable;
    for (int pumps = 0; more && conn->user && pumps < PUMPS_PER_TURN; pumps++) {
        if (OUT_SIZE - out_size < DATA_FRAME) break;
        more = conn->user->pump(conn);
    }
    if (out_size) send_out(line);
    if (line->rude) line->unsent_size = 0;
    /* Say nothing on a broken line, where a reset is still to be told to the user. */
    if (line->ending && !line->unsent_size && !line->broken) {
        line->ending = false;
        line->shut = true;
        shutdown(line->watch.fd, SHUT_WR);
    }
    if (line->finishing && !line->unsent_size) {
        /* Shut it down: a close is not enough while a program being started holds the socket, too.
         * What was sent before is delivered. */
        shutdown(line->watch.fd, SHUT_RDWR);
        drop(line);
        return false;
    }
    return more && conn->user && line->writable;
}

static void end(struct conn *conn) {
    ((struct line *)conn)->ending = true;
    conn_queue(conn);
}

static void finish(struct conn *conn) {
    conn->user = NULL;
    ((struct line *)conn)->finishing = true;
    conn_queue(conn);
}

static void reset(struct conn *conn) {
    struct line *line = (struct line *)conn;
    line->rude = true;
    line->ending = false;
    finish(conn);
}

static bool can_send(void) { return true; }
static void flush(void) {}

/* --- receiving --- */

static void resume(struct conn *conn) {
    struct line *line = (struct line *)conn;
    inbox_offer_again(&line->inbox, conn);
    if (line->inbox.size) return;
    inbox_tell_end(&line->inbox, conn);
    list(line);
}

/* Find out whether the host has closed altogether, or has ended sending only. When this side has
 * ended sending nothing tells, and nothing depends on it. */
static bool is_closed(struct line *line) {
    if (line->shut) return false;
    return line->broken || (send(line->watch.fd, "", 0, MSG_NOSIGNAL) < 0 && errno == EPIPE);
}

/* Read once, and hand on what came. A host that has closed reads no answers: its line is broken off
 * even though the user has not used all. */
static void take_line(struct line *line) {
    if (line->inbox.size || line->inbox.ended) {
        if (line->closing && is_closed(line)) break_off(line);
        return;
    }
    if (!line->readable) return;
    ssize_t got = recv(line->watch.fd, in, sizeof in, 0);
    if (got < 0) {
        if (errno == EAGAIN) line->readable = false;
        else if (errno == EINTR) list(line);
        else break_off(line);
        return;
    }
    if (got == 0) {
        line->inbox.ended = line->closing = true;
        if (is_closed(line)) break_off(line);
        else inbox_tell_end(&line->inbox, &line->conn);
        return;
    }
    /* Wait for the next event: a socket that gave less is empty. */
    if ((size_t)got < sizeof in && !line->closing) line->readable = false;
    inbox_take(&line->inbox, &line->conn, in, (size_t)got);
    if (line->readable) list(line);
}

static bool is_host(const struct sockaddr_storage *peer) {
    return unix_directory || ((const struct sockaddr_vm *)peer)->svm_cid == VMADDR_CID_HOST;
}

static void take_connection(void) {
    struct sockaddr_storage peer = {0};
    socklen_t size = sizeof peer;
    int fd = accept4(listener.fd, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
    acceptable = false; /* the watch is level-triggered: it tells again if there are more */
    if (fd < 0) return;
    /* Refuse programs of this machine, which can dial its address. */
    if (lines >= MAX_CONNECTIONS || !is_host(&peer)) {
        close(fd);
        return;
    }
    accepted(&add(fd, true)->conn);
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

static int open_socket(void) {
    int family = unix_directory ? AF_UNIX : AF_VSOCK;
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) die("socket: %s", strerror(errno));
    return fd;
}

static struct conn *dial(uint32_t port) {
    struct sockaddr_storage address;
    socklen_t size = address_of(port, VMADDR_CID_HOST, &address);
    struct timeval patience = {.tv_sec = CONNECT_TIMEOUT_S};
    int fd = open_socket();
    if (!unix_directory)
        setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &patience, sizeof patience);
    bool connected = !connect(fd, (struct sockaddr *)&address, size);
    if (!connected && errno != EINPROGRESS) {
        int error = errno;
        close(fd);
        errno = error;
        return NULL;
    }
    return &add(fd, connected)->conn;
}

static void listen_on(uint32_t port, void (*then)(struct conn *)) {
    accepted = then;
    struct sockaddr_storage address;
    socklen_t size = address_of(port, VMADDR_CID_ANY, &address);
    int fd = open_socket();
    if (bind(fd, (struct sockaddr *)&address, size) || listen(fd, MAX_CONNECTIONS))
        die("agent port: %s", strerror(errno));
    watch_add_level(&listener, fd, EPOLLIN, listener_ready);
}

/* Say whether the machine has its device by now: it has an address then. */
static bool has_cid(void *unused) {
    (void)unused;
    unsigned cid = VMADDR_CID_ANY;
    int fd = open("/dev/vsock", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return false;
    bool known = !ioctl(fd, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid) && cid != VMADDR_CID_ANY;
    close(fd);
    return known;
}

static const struct carrier sockets = {
    .reserve = reserve,
    .commit = commit,
    .resume = resume,
    .end = end,
    .finish = finish,
    .reset = reset,
    .turn = turn,
    .can_send = can_send,
    .flush = flush,
    .dial = dial,
    .listen = listen_on,
    .take = take,
};

const struct carrier *socket_carrier(const char *directory) {
    unix_directory = directory;
    if (!directory && !wait_for_device(has_cid, NULL, TRANSPORT_WAIT_MS))
        die("no virtio-vsock device");
    return &sockets;
}
