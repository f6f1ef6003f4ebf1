#include "programs/exec.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include "core/image.h"
#include "programs/freezer.h"
#include "programs/program.h"
#include "programs/request.h"
#include "programs/stdpipes.h"
#include "programs/streams.h"
#include "system/children.h"
#include "system/newfile.h"

#define EXIT_TIMED_OUT 1u

struct exec {
    struct session *session;
    uint8_t *payload; /* has the strings of the request */
    struct request request;
    struct identity identity;
    const char **environment;
    char *cwd;

    struct new_file file; /* being staged */
    uint32_t files_done;
    uint64_t file_left;

    struct input input;
    struct output outputs[2];
    int program_ends[3]; /* for the programs of the chain that are still to come */

    /* The first process stays a zombie until the end: the group of all is named by its pid. */
    struct child first, later, *leader;
    pid_t group; /* 0: nothing was started */
    uint32_t stage;
    struct start_held held;
    bool exited, timed_out, last_was_second;
    struct timer timeout;
    uint64_t started_ns, peak_rss_kib;
    struct exec *next, **link; /* in the list of all */
};

static struct exec *all;

static void leader_ended(struct watch *watch, uint32_t events);

static bool is_terminal(const struct exec *exec) { return exec->request.flags & EXEC_TERMINAL; }

static int any_master(const struct exec *exec) {
    return exec->outputs[0].watch.fd >= 0 ? exec->outputs[0].watch.fd : exec->input.watch.fd;
}

static void kill_group(struct exec *exec) {
    if (!exec->group) return;
    kill(-exec->group, SIGKILL);
    /* Kill the foreground job, too: a shell gives each job a group of its own. */
    pid_t foreground = 0;
    int master = is_terminal(exec) ? any_master(exec) : -1;
    if (master >= 0 && !ioctl(master, TIOCGPGRP, &foreground) && foreground > 1)
        kill(-foreground, SIGKILL);
}

static void close_if_done(struct exec *exec) {
    if (exec->exited && exec->outputs[0].watch.fd < 0 && exec->outputs[1].watch.fd < 0)
        session_finish(exec->session);
}

/* --- starting --- */

/* Start the program of this stage of the chain. 0, or an errno and what failed. */
static int start_stage(struct exec *exec, const char **failed) {
    struct program program = {
        .argv = exec->request.chain[exec->stage],
        .environment = exec->environment,
        .cwd = exec->cwd,
        .identity = &exec->identity,
        .terminal = is_terminal(exec),
        .group = exec->group,
    };
    memcpy(program.stdio, exec->program_ends, sizeof program.stdio);
    int slave = -1;
    if (program.terminal) {
        *failed = "terminal";
        slave = terminal_slave(any_master(exec), exec->identity.uid);
        if (slave < 0) return errno;
        for (int i = 0; i < 3; i++) program.stdio[i] = slave;
    }
    pid_t pid = spawn(&program, failed);
    int error = errno;
    if (slave >= 0) close(slave);
    if (pid < 0) return error;
    exec->leader = exec->group ? &exec->later : &exec->first;
    if (!exec->group) exec->group = pid;
    child_watch(exec->leader, pid, leader_ended);
    bool last = exec->stage + 1 == exec->request.chain_count;
    if (last) close_all(exec->program_ends);
    return 0;
}

static void timed_out(struct timer *timer) {
    struct exec *exec = CONTAINER(timer, struct exec, timeout);
    if (!exec->exited) exec->timed_out = true;
    kill_group(exec);
}

static void adopt_ends(struct exec *exec, struct ends *ends) {
    memcpy(exec->program_ends, ends->program, sizeof exec->program_ends);
    exec->input.terminal = exec->outputs[0].terminal = is_terminal(exec);
    for (uint8_t i = 0; i < 2; i++)
        if (ends->agent[i + 1] >= 0)
            output_open(&exec->outputs[i], exec->session, (uint8_t)(i + 1), ends->agent[i + 1]);
}

static void start_now(struct start_held *held);

static void start(struct exec *exec) {
    struct session *session = exec->session;
    struct ends ends;
    const char *failed = "standard streams";
    if (!freezer_allows(&exec->held, start_now)) return;
    if (open_ends(&exec->request, exec->identity.uid, &ends)) {
        session_fail(session, errno, 0, "%s: %s", failed, strerror(errno));
        return;
    }
    adopt_ends(exec, &ends);
    int error = start_stage(exec, &failed);
    if (error) {
        if (ends.agent[0] >= 0) close(ends.agent[0]);
        session_fail(session, error, failed == exec->cwd, "%.300s: %s", failed, strerror(error));
        return;
    }
    exec->started_ns = now_ns();
    session_send_u32(session, STARTED, 0, (uint32_t)exec->leader->pid);
    if (ends.agent[0] >= 0) input_open(&exec->input, session, ends.agent[0]);
    if (exec->request.timeout_ms)
        timer_set(&exec->timeout, exec->started_ns + exec->request.timeout_ms * NS_PER_MS,
                  timed_out);
}

static void start_now(struct start_held *held) { start(CONTAINER(held, struct exec, held)); }

/* --- staged files --- */

/* Open the next file to stage. Publish those that are complete. After the last, start. */
static void stage_on(struct exec *exec) {
    const struct request *request = &exec->request;
    while (exec->files_done < request->file_count) {
        const struct staged *staged = &request->files[exec->files_done];
        bool sound = true;
        if (exec->file.fd < 0) {
            char *path = join_path(exec->cwd, staged->path);
            sound = path && !new_file_open(&exec->file, path, staged->mode);
            free(path);
            exec->file_left = staged->size;
        }
        if (sound && exec->file_left) return; /* its data is to come */
        if (sound) sound = !new_file_publish(&exec->file, exec->identity.uid, exec->identity.gid);
        if (!sound) {
            session_fail(exec->session, errno, 0, "%.300s: %s", staged->path, strerror(errno));
            return;
        }
        exec->files_done++;
    }
    start(exec);
}

static bool stage_data(struct exec *exec, const uint8_t *bytes, size_t size) {
    if (exec->files_done == exec->request.file_count || size > exec->file_left) return false;
    exec->file_left -= size;
    if (new_file_write(&exec->file, bytes, size)) {
        session_fail(exec->session, errno, 0, "%.300s: %s",
                     exec->request.files[exec->files_done].path, strerror(errno));
        return true;
    }
    if (!exec->file_left) stage_on(exec);
    return true;
}

/* --- the end --- */

static void send_exit(struct exec *exec, int returncode) {
    uint8_t payload[24];
    struct writer writer = {payload};
    write_u32(&writer, (uint32_t)returncode);
    write_u32(&writer, exec->timed_out ? EXIT_TIMED_OUT : 0);
    write_u64(&writer, (now_ns() - exec->started_ns) / 1000);
    write_u64(&writer, exec->peak_rss_kib);
    exec->exited = true; /* the timeout goes on, for descendants that hold a stream open */
    close_all(exec->program_ends);
    input_close(&exec->input);
    session_send(exec->session, EXIT, 0, payload, sizeof payload);
    exec->outputs[0].last_stage = true;
    if (is_terminal(exec)) exec->outputs[0].readable = true; /* its end is still to be found */
    close_if_done(exec);
}

/* Leave the stage that has ended. A terminal's session ends with its leader, so that the next stage
 * begins a group of its own. */
static void leave_stage(struct exec *exec) {
    if (is_terminal(exec)) {
        kill_group(exec);
        child_reap(&exec->first);
        exec->group = 0;
    } else if (exec->leader == &exec->later) {
        child_reap(&exec->later);
    }
    exec->leader = NULL;
}

static void next_stage_now(struct start_held *held);

static void next_stage(struct exec *exec) {
    if (!freezer_allows(&exec->held, next_stage_now)) return;
    const char *failed;
    int error = exec->timed_out ? 0 : start_stage(exec, &failed);
    if (exec->timed_out) send_exit(exec, -SIGKILL);
    else if (error) send_exit(exec, error == ENOENT ? 127 : 126); /* as in a shell */
}

static void next_stage_now(struct start_held *held) {
    next_stage(CONTAINER(held, struct exec, held));
}

static void leader_ended(struct watch *watch, uint32_t events) {
    (void)events;
    struct child *child = CONTAINER(watch, struct child, ended);
    struct exec *exec = child->owner;
    struct ending ending;
    if (exec->exited || child != exec->leader || !child_ended(child, &ending)) return;
    if (ending.peak_rss_kib > exec->peak_rss_kib) exec->peak_rss_kib = ending.peak_rss_kib;
    bool last = exec->stage + 1 == exec->request.chain_count;
    if (ending.returncode || last || exec->timed_out) {
        send_exit(exec, ending.returncode);
        return;
    }
    leave_stage(exec);
    exec->stage++;
    next_stage(exec);
}

static void exec_gone(struct session *session) {
    struct exec *exec = session->state;
    if (!exec) return;
    session->state = NULL;
    *exec->link = exec->next;
    if (exec->next) exec->next->link = exec->link;
    kill_group(exec);
    freezer_withdraw(&exec->held);
    timer_clear(&exec->timeout);
    child_abandon(&exec->first);
    child_abandon(&exec->later);
    input_close(&exec->input);
    watch_drop(&exec->outputs[0].watch);
    watch_drop(&exec->outputs[1].watch);
    close_all(exec->program_ends);
    new_file_discard(&exec->file);
    request_release(&exec->request);
    free(exec->environment);
    free(exec->cwd);
    free(exec->payload);
    free_later(exec);
}

/* --- the host's frames --- */

static bool begin(struct session *session, struct reader *payload) {
    struct exec *exec = must_alloc(sizeof *exec);
    exec->session = session;
    exec->first.owner = exec->later.owner = exec;
    exec->first.ended.fd = exec->later.ended.fd = exec->file.fd = exec->input.watch.fd = -1;
    for (int i = 0; i < 3; i++) exec->program_ends[i] = -1;
    exec->outputs[0].watch.fd = exec->outputs[1].watch.fd = -1;
    session->state = exec;
    exec->next = all;
    exec->link = &all;
    if (all) all->link = &exec->next;
    all = exec;
    if (!request_read(&exec->request, payload)) return false;
    exec->payload = session_take_payload(session);
    exec->outputs[0].credit = exec->outputs[1].credit = exec->request.window;

    char message[300];
    const char *user = *exec->request.user ? exec->request.user : image.user;
    int error = find_identity(user, &exec->identity, message, sizeof message);
    if (error) {
        session_fail(session, error, 0, "%s", message);
        return true;
    }
    exec->cwd =
        *exec->request.cwd ? join_path(image.workdir, exec->request.cwd) : strdup(image.workdir);
    exec->environment = merge_environment(
        image.environment, (const char *const *)exec->request.environment,
        exec->request.flags & EXEC_EXACT_ENVIRONMENT, exec->identity.home, is_terminal(exec));
    if (!exec->cwd || !exec->environment) session_fail(session, ENOMEM, 0, "%s", strerror(ENOMEM));
    else stage_on(exec);
    return true;
}

static bool take_window(struct exec *exec, uint8_t stream, struct reader *payload) {
    uint32_t more = read_u32(payload);
    if (!read_whole(payload) || stream < 1 || stream > 2) return false;
    exec->outputs[stream - 1].credit += more;
    session_wake(exec->session);
    return true;
}

static bool take_close(struct exec *exec, uint8_t stream, struct reader *payload) {
    if (!read_whole(payload) || stream < 1 || stream > 2) return false;
    watch_drop(&exec->outputs[stream - 1].watch);
    if (is_terminal(exec)) input_close(&exec->input); /* with its last end closed it hangs up */
    close_if_done(exec);
    return true;
}

static bool take_signal(struct exec *exec, struct reader *payload) {
    uint32_t sequence = read_u32(payload);
    int signum = (int)read_u32(payload);
    uint32_t group = read_u32(payload);
    if (!read_whole(payload)) return false;
    int error = ESRCH;
    /* A group may have members when its leader has ended. */
    if (group ? exec->group != 0 : exec->leader && !exec->exited)
        error = kill(group ? -exec->group : exec->leader->pid, signum) ? errno : 0;
    uint32_t answer[2] = {sequence, (uint32_t)error};
    session_send(exec->session, ACK, 0, answer, sizeof answer);
    return true;
}

static bool take_resize(struct exec *exec, struct reader *payload) {
    uint16_t columns = read_u16(payload), rows = read_u16(payload);
    if (!read_whole(payload)) return false;
    if (is_terminal(exec) && any_master(exec) >= 0)
        terminal_resize(any_master(exec), columns, rows);
    return true;
}

static bool exec_frame(struct session *session, enum frame_type type, uint8_t stream,
                       struct reader *payload) {
    struct exec *exec = session->state;
    if (!exec) return type == EXEC && begin(session, payload);
    switch (type) {
    case WINDOW: return take_window(exec, stream, payload);
    case CLOSE: return take_close(exec, stream, payload);
    case SIGNAL: return take_signal(exec, payload);
    case RESIZE: return take_resize(exec, payload);
    case END: return stream == 0 && read_whole(payload) && input_end(&exec->input);
    default: return false;
    }
}

static bool exec_data(struct session *session, uint8_t stream, const uint8_t *bytes, size_t size) {
    struct exec *exec = session->state;
    if (stream == 3) return stage_data(exec, bytes, size);
    return stream == 0 && input_data(&exec->input, bytes, size);
}

static bool exec_produce(struct session *session) {
    struct exec *exec = session->state;
    if (input_grant(&exec->input)) return true;
    for (int i = 0; i < 2; i++) {
        /* The streams take turns. */
        exec->last_was_second = !exec->last_was_second;
        enum produced produced = output_produce(&exec->outputs[exec->last_was_second]);
        if (produced == PRODUCED_END) close_if_done(exec);
        if (produced != PRODUCED_NOTHING) return true;
    }
    return false;
}

void exec_kill_all(void) {
    for (struct exec *exec = all; exec; exec = exec->next) kill_group(exec);
}

const struct action exec_action = {
    .frame = exec_frame,
    .data = exec_data,
    .produce = exec_produce,
    .gone = exec_gone,
};
