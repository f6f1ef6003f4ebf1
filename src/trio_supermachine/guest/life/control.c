#include "life/control.h"

#include <stdlib.h>
#include <string.h>

#include "core/machine.h"
#include "life/power.h"
#include "network/listeners.h"
#include "programs/freezer.h"
#include "programs/workload.h"
#include "system/unique.h"

static void answer(struct session *session, int error, uint64_t value) {
    if (error) {
        session_fail(session, error, 0, "%s", strerror(error));
        return;
    }
    session_send_ok(session, value);
    session_finish(session);
}

static bool control_frame(struct session *session, enum frame_type type, uint8_t stream,
                          struct reader *payload) {
    (void)stream;
    if (session->state) return false; /* a connection takes one action */
    session->state = session;
    switch (type) {
    case PING:
        if (!read_whole(payload)) return false;
        answer(session, 0, now_ns());
        return true;
    case WORKLOAD_START: {
        uint32_t ignored;
        const char **argv = read_list(payload, &ignored);
        bool whole = read_whole(payload);
        if (whole) answer(session, workload_start((const char *const *)argv), 0);
        free(argv);
        return whole;
    }
    case WORKLOAD_SIGNAL: {
        int signum = (int)read_u32(payload);
        if (!read_whole(payload)) return false;
        answer(session, workload_signal(signum), 0);
        return true;
    }
    case WORKLOAD_WAIT:
        if (!read_whole(payload)) return false;
        workload_await(session);
        return true;
    case SET_CLOCK: {
        uint64_t realtime_ns = read_u64(payload);
        if (!read_whole(payload)) return false;
        if (machine_is_ours) set_clock(realtime_ns);
        answer(session, 0, 0);
        return true;
    }
    case SHUTDOWN: {
        uint32_t grace_ms = read_u32(payload);
        if (!read_whole(payload)) return false;
        shut_down(session, grace_ms);
        return true;
    }
    case FREEZE:
        if (!read_whole(payload)) return false;
        freezer_freeze(session);
        return true;
    case THAW:
        if (!read_whole(payload)) return false;
        freezer_thaw();
        answer(session, 0, 0);
        return true;
    case AWAIT_LISTENER: {
        uint32_t timeout_ms = read_u32(payload), port = read_u32(payload);
        if (!read_whole(payload) || port > UINT16_MAX) return false;
        listeners_await(session, timeout_ms, port);
        return true;
    }
    default: return false;
    }
}

static void control_gone(struct session *session) {
    workload_forget(session);
    freezer_forget(session);
    listeners_forget(session);
    shut_down_forget(session);
}

const struct action control_action = {
    .frame = control_frame,
    .gone = control_gone,
};
