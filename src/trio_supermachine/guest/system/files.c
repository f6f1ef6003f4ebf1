#include "system/files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/image.h"
#include "core/loop.h"
#include "system/newfile.h"

/* --- reading --- */

struct reading {
    int fd;
    uint64_t left; /* of the cap */
    uint64_t sent;
};

static int open_readable(const char *path, struct stat *status) {
    /* Do not wait for the other end of a FIFO: the loop must not hang. */
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0) return -1;
    bool known = !fstat(fd, status);
    if (known && (S_ISREG(status->st_mode) || S_ISCHR(status->st_mode) || S_ISBLK(status->st_mode)))
        return fd;
    close(fd);
    errno = S_ISDIR(status->st_mode) ? EISDIR : EINVAL;
    return -1;
}

static bool read_file_frame(struct session *session, enum frame_type type, uint8_t stream,
                            struct reader *payload) {
    (void)stream;
    if (type != READ_FILE || session->state) return false;
    const char *name = read_string(payload);
    uint64_t cap = read_u64(payload);
    if (!read_whole(payload)) return false;
    struct stat status = {0};
    char *path = join_path(image.workdir, name);
    int fd = path ? open_readable(path, &status) : -1;
    int error = errno;
    free(path);
    if (fd < 0) {
        session_fail(session, error, 0, "%.300s: %s", name, strerror(error));
    } else if ((uint64_t)status.st_size > cap) {
        close(fd);
        session_fail(session, EFBIG, (uint64_t)status.st_size, "%.300s: beyond the cap", name);
    } else {
        struct reading *reading = must_alloc(sizeof *reading);
        reading->fd = fd;
        reading->left = cap;
        session->state = reading;
        session_send_ok(session, (uint64_t)status.st_size);
    }
    return true;
}

static bool read_file_produce(struct session *session) {
    struct reading *reading = session->state;
    uint8_t *at;
    size_t room = session_room(session, &at);
    if (!room) return false;
    ssize_t got;
    do got = read(reading->fd, at, room);
    while (got < 0 && errno == EINTR);
    if (got < 0) {
        session_fail(session, errno, reading->sent, "reading: %s", strerror(errno));
    } else if (got == 0) {
        session_send(session, END, 0, NULL, 0);
        session_finish(session);
    } else if ((uint64_t)got > reading->left) {
        /* Refuse what grew, or is a file whose size the kernel does not tell. */
        session_fail(session, EFBIG, reading->sent + (uint64_t)got, "beyond the cap");
    } else {
        reading->left -= (uint64_t)got;
        reading->sent += (uint64_t)got;
        session_send_data(session, 0, (size_t)got);
    }
    return true;
}

static void read_file_gone(struct session *session) {
    struct reading *reading = session->state;
    if (!reading) return;
    close(reading->fd);
    free_later(reading);
    session->state = NULL;
}

const struct action read_file_action = {
    .frame = read_file_frame,
    .produce = read_file_produce,
    .gone = read_file_gone,
};

/* --- writing --- */

static bool write_file_begin(struct session *session, struct reader *payload) {
    const char *name = read_string(payload);
    uint32_t mode = read_u32(payload);
    if (!read_whole(payload)) return false;
    struct new_file *file = must_alloc(sizeof *file);
    char *path = join_path(image.workdir, name);
    int failed = path ? new_file_open(file, path, mode) : -1;
    int error = errno;
    free(path);
    if (failed) {
        free(file);
        session_fail(session, error, 0, "%.300s: %s", name, strerror(error));
        return true;
    }
    session->state = file;
    session_send_ok(session, 0);
    return true;
}

static bool write_file_frame(struct session *session, enum frame_type type, uint8_t stream,
                             struct reader *payload) {
    struct new_file *file = session->state;
    if (!file) return type == WRITE_FILE && write_file_begin(session, payload);
    if (type != END || stream != 0 || !read_whole(payload)) return false;
    if (new_file_publish(file, 0, 0)) {
        session_fail(session, errno, 0, "publishing: %s", strerror(errno));
    } else {
        session_send_ok(session, 0);
        session_finish(session);
    }
    return true;
}

static bool write_file_data(struct session *session, uint8_t stream, const uint8_t *bytes,
                            size_t size) {
    struct new_file *file = session->state;
    if (stream != 0) return false;
    if (new_file_write(file, bytes, size))
        session_fail(session, errno, 0, "writing: %s", strerror(errno));
    return true;
}

static void write_file_gone(struct session *session) {
    struct new_file *file = session->state;
    if (!file) return;
    new_file_discard(file);
    free_later(file);
    session->state = NULL;
}

const struct action write_file_action = {
    .frame = write_file_frame,
    .data = write_file_data,
    .gone = write_file_gone,
};
