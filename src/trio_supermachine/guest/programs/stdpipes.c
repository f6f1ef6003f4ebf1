#include "programs/stdpipes.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#define TTY_GROUP 5

void close_all(int fds[3]) {
    for (int i = 0; i < 3; i++) {
        if (fds[i] >= 0) close(fds[i]);
        fds[i] = -1;
    }
}

void terminal_resize(int master, uint16_t columns, uint16_t rows) {
    struct winsize size = {.ws_col = columns, .ws_row = rows};
    ioctl(master, TIOCSWINSZ, &size);
}

int terminal_slave(int master, uid_t owner) {
    int slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0) return -1;
    if (owner && !fchown(slave, owner, TTY_GROUP)) fchmod(slave, 0620);
    return slave;
}

static int open_terminal(const struct request *request, struct ends *ends) {
    int unlock = 0;
    int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (master < 0) return -1;
    ends->agent[1] = master;
    if (ioctl(master, TIOCSPTLCK, &unlock)) return -1;
    terminal_resize(master, request->columns ? request->columns : 80,
                    request->rows ? request->rows : 24);
    if (request->flags & EXEC_STDIN) {
        ends->agent[0] = fcntl(master, F_DUPFD_CLOEXEC, 3);
        if (ends->agent[0] < 0) return -1;
    }
    return 0;
}

/* Make one pipe. `out`: the program writes it. */
static int open_pipe(int *agent, int *program, bool out, uid_t owner) {
    int pair[2];
    if (pipe2(pair, O_CLOEXEC)) return -1;
    *agent = pair[out ? 0 : 1];
    *program = pair[out ? 1 : 0];
    /* Let the user's program open /dev/stdout anew. */
    if (owner) (void)!fchown(*program, owner, (gid_t)-1);
    return fcntl(*agent, F_SETFL, O_NONBLOCK | (out ? O_RDONLY : O_WRONLY));
}

static int open_null(int *program, int mode) {
    *program = open("/dev/null", mode | O_CLOEXEC);
    return *program < 0 ? -1 : 0;
}

static int open_pipes(const struct request *request, uid_t owner, struct ends *ends) {
    uint32_t flags = request->flags;
    int *agent = ends->agent, *program = ends->program;
    if (flags & EXEC_STDIN ? open_pipe(&agent[0], &program[0], false, owner)
                           : open_null(&program[0], O_RDONLY))
        return -1;
    if (flags & EXEC_NULL_STDOUT ? open_null(&program[1], O_WRONLY)
                                 : open_pipe(&agent[1], &program[1], true, owner))
        return -1;
    if (flags & EXEC_MERGE_STDERR) {
        program[2] = fcntl(program[1], F_DUPFD_CLOEXEC, 3);
        return program[2] < 0 ? -1 : 0;
    }
    return flags & EXEC_NULL_STDERR ? open_null(&program[2], O_WRONLY)
                                    : open_pipe(&agent[2], &program[2], true, owner);
}

int open_ends(const struct request *request, uid_t owner, struct ends *ends) {
    for (int i = 0; i < 3; i++) ends->agent[i] = ends->program[i] = -1;
    int failed = request->flags & EXEC_TERMINAL ? open_terminal(request, ends)
                                                : open_pipes(request, owner, ends);
    if (!failed) return 0;
    int error = errno;
    close_all(ends->agent);
    close_all(ends->program);
    errno = error;
    return -1;
}
