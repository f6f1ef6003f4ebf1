#include "programs/streams.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

/* Enlarge the pipe of a program that moves much: there are fewer switches between it and this one.
 * Most programs move little. */
#define PIPE_SIZE 262144
#define MUCH 32768

/* --- output --- */

static void output_ready(struct watch *watch, uint32_t events) {
    struct output *output = CONTAINER(watch, struct output, watch);
    output->readable = true;
    if (events & (EPOLLHUP | EPOLLERR)) output->hung_up = true;
    output->drained = output->hung_up && !(events & EPOLLIN) && !output->terminal;
    session_wake(output->session);
}

void output_open(struct output *output, struct session *session, uint8_t stream, int fd) {
    output->session = session;
    output->stream = stream;
    watch_add(&output->watch, fd, EPOLLIN, output_ready);
}

static enum produced output_end(struct output *output) {
    watch_drop(&output->watch);
    session_send(output->session, END, output->stream, NULL, 0);
    return PRODUCED_END;
}

enum produced output_produce(struct output *output) {
    if (output->watch.fd < 0 || !output->readable) return PRODUCED_NOTHING;
    if (output->drained) return output_end(output);
    if (!output->credit) return PRODUCED_NOTHING;
    uint8_t *at;
    size_t room = session_room(output->session, &at);
    if (room > output->credit) room = (size_t)output->credit;
    if (!room) return PRODUCED_NOTHING;
    ssize_t got = read(output->watch.fd, at, room);
    if (got > 0) {
        output->credit -= (uint64_t)got;
        /* Wait for the next event: a pipe that gave less is empty. */
        if ((size_t)got < room && !output->hung_up && !output->terminal) output->readable = false;
        if (got >= MUCH && !output->enlarged && !output->terminal) {
            output->enlarged = true;
            fcntl(output->watch.fd, F_SETPIPE_SZ, PIPE_SIZE);
        }
        session_send_data(output->session, output->stream, (size_t)got);
        return PRODUCED_DATA;
    }
    if (got < 0 && errno == EINTR) return PRODUCED_DATA;
    output->readable = false;
    if (got < 0 && (errno == EAGAIN || (output->terminal && !output->last_stage)))
        return PRODUCED_NOTHING;
    return output_end(output);
}

/* --- input --- */

void input_close(struct input *input) {
    watch_drop(&input->watch);
    free(input->buffer);
    input->buffer = NULL;
    input->size = 0;
}

/* Close an input that the program reads no more, and tell the host. */
static void input_refused(struct input *input) {
    input_close(input);
    if (!input->ending) session_send(input->session, CLOSE, 0, NULL, 0);
}

static size_t input_write(struct input *input, const uint8_t *bytes, size_t size) {
    size_t done = 0;
    while (done < size && input->writable && input->watch.fd >= 0) {
        ssize_t written = write(input->watch.fd, bytes + done, size - done);
        if (written >= 0) {
            done += (size_t)written;
        } else if (errno == EAGAIN && !input->enlarged && !input->terminal) {
            input->enlarged = true;
            fcntl(input->watch.fd, F_SETPIPE_SZ, PIPE_SIZE);
        } else if (errno == EAGAIN) {
            input->writable = false;
        } else if (errno != EINTR) {
            input_refused(input);
            return size;
        }
    }
    input->owed += (uint32_t)done;
    return done;
}

static void input_flush(struct input *input) {
    size_t written = input_write(input, input->buffer + input->at, input->size);
    if (input->watch.fd < 0) return;
    input->at += written;
    input->size -= written;
    if (input->size) return;
    free(input->buffer);
    input->buffer = NULL;
    input->at = 0;
    if (input->ending && !input->terminal) input_close(input);
}

static void input_ready(struct watch *watch, uint32_t events) {
    struct input *input = CONTAINER(watch, struct input, watch);
    if (events & EPOLLERR && !input->terminal) {
        input_refused(input);
        return;
    }
    input->writable = true;
    input_flush(input);
    if (input->owed >= STDIN_WINDOW / 2) session_wake(input->session);
}

void input_open(struct input *input, struct session *session, int fd) {
    input->session = session;
    input->writable = true;
    if (input->ending && !input->terminal) { /* END has come already */
        close(fd);
        return;
    }
    input->credit = STDIN_WINDOW;
    session_send_u32(session, WINDOW, 0, STDIN_WINDOW);
    watch_add(&input->watch, fd, EPOLLOUT, input_ready);
}

static void input_put(struct input *input, const uint8_t *bytes, size_t size) {
    size_t written = input->size ? 0 : input_write(input, bytes, size);
    if (written == size || input->watch.fd < 0) return;
    /* Have room for a whole window, and for the end of a terminal's input. */
    const size_t capacity = STDIN_WINDOW + 2;
    if (!input->buffer) input->buffer = must_alloc(capacity);
    if (input->at + input->size + size - written > capacity) {
        memmove(input->buffer, input->buffer + input->at, input->size);
        input->at = 0;
    }
    memcpy(input->buffer + input->at + input->size, bytes + written, size - written);
    input->size += size - written;
}

bool input_data(struct input *input, const uint8_t *bytes, size_t size) {
    if (input->ending || size > input->credit) return false;
    input->credit -= (uint32_t)size;
    if (input->watch.fd < 0) return true; /* thrown away: the host has not seen CLOSE yet */
    input->last = bytes[size - 1];
    input_put(input, bytes, size);
    if (input->owed >= STDIN_WINDOW / 2) session_wake(input->session);
    return true;
}

bool input_end(struct input *input) {
    if (input->ending) return false;
    input->ending = true;
    if (input->watch.fd < 0) return true;
    if (!input->terminal) {
        input_flush(input);
        return true;
    }
    struct termios settings;
    uint8_t end = 4;
    if (!tcgetattr(input->watch.fd, &settings)) end = settings.c_cc[VEOF];
    /* Send it twice within a line, where the first only hands over what was typed. */
    uint8_t twice[2] = {end, end};
    bool in_line = input->last && input->last != '\n' && input->last != '\r';
    input_put(input, twice, in_line ? 2 : 1);
    return true;
}

bool input_grant(struct input *input) {
    if (input->owed < STDIN_WINDOW / 2 || input->watch.fd < 0) return false;
    /* Give nothing back for the end of a terminal's input, which the host did not send. */
    uint32_t grant = input->ending ? 0 : input->owed;
    input->credit += grant;
    input->owed = 0;
    if (grant) session_send_u32(input->session, WINDOW, 0, grant);
    return grant;
}
