#include "life/lifeline.h"

#include <errno.h>
#include <string.h>
#include <sys/utsname.h>

#include "core/image.h"
#include "core/machine.h"
#include "core/session.h"
#include "life/power.h"
#include "network/network.h"
#include "programs/freezer.h"
#include "programs/workload.h"
#include "system/mount.h"
#include "system/unique.h"

#define MIN_SEED 32u
#define MAX_SEED 512u

static const struct carrier *lifeline_carrier;

static enum { BOOTED, RUNNING, COPIED } phase;
enum { KIND_BOOT = 0, KIND_RESTORE = 1 };

struct setup {
    uint32_t version, layers;
    uint64_t realtime_ns;
    const char *hostname, *workdir, *user, *machine_id;
    const uint8_t *seed;
    uint32_t seed_size;
    const char **environment, **workload;
    int stop_signal;
};

static bool is_seed(uint32_t size) { return size >= MIN_SEED && size <= MAX_SEED; }

static bool setup_read(struct setup *setup, struct reader *payload) {
    uint32_t ignored;
    setup->version = read_u32(payload);
    setup->realtime_ns = read_u64(payload);
    setup->hostname = read_string(payload);
    setup->seed = read_bytes(payload, &setup->seed_size);
    setup->layers = read_u32(payload);
    setup->environment = read_list(payload, &ignored);
    setup->workdir = read_string(payload);
    setup->user = read_string(payload);
    setup->workload = read_list(payload, &ignored);
    setup->stop_signal = (int)read_u32(payload);
    setup->machine_id = read_string(payload);
    return read_whole(payload) && is_seed(setup->seed_size) && is_machine_id(setup->machine_id);
}

/* Set up all but what is the image's. NULL, or what failed, with errno. */
static const char *set_up_machine(const struct setup *setup) {
    add_entropy(setup->seed, setup->seed_size);
    set_clock(setup->realtime_ns);
    const char *failed = mount_root(setup->layers);
    if (failed) return failed;
    freezer_open();
    name_host(setup->hostname);
    set_machine_id(setup->machine_id);
    network_open(lifeline_carrier);
    return NULL;
}

static void fail(struct session *session, const char *what) {
    session_fail(session, errno, 0, "%.300s: %s", what, strerror(errno));
}

static bool set_up(struct session *session, struct reader *payload) {
    static struct setup setup; /* the image points into its payload, which stays */
    if (setup.environment || !setup_read(&setup, payload)) return false;
    session_take_payload(session);
    const char *failed = NULL;
    errno = EPROTO;
    if (setup.version != WIRE_VERSION) failed = "version of the wire";
    if (!failed && machine_is_ours) failed = set_up_machine(&setup);
    image.environment = (const char *const *)setup.environment;
    image.workdir = *setup.workdir ? setup.workdir : "/";
    image.user = setup.user;
    if (!failed && make_dirs(image.workdir, 0755)) failed = image.workdir;
    if (failed) {
        fail(session, failed);
        return true;
    }
    if (setup.stop_signal > 0) image.stop_signal = setup.stop_signal;
    lifeline_carrier->listen(AGENT_PORT, session_accept);
    workload_start((const char *const *)setup.workload);
    phase = RUNNING;
    session_send(session, READY, 0, NULL, 0);
    return true;
}

static bool restore(struct session *session, struct reader *payload) {
    uint32_t version = read_u32(payload), seed_size;
    uint64_t realtime_ns = read_u64(payload);
    const char *hostname = read_string(payload);
    const uint8_t *seed = read_bytes(payload, &seed_size);
    const char *machine_id = read_string(payload), *boot_id = read_string(payload);
    bool ends_programs = read_u32(payload) & 1;
    if (!read_whole(payload) || !is_seed(seed_size) || !is_machine_id(machine_id) ||
        !is_boot_id(boot_id))
        return false;
    if (version != WIRE_VERSION) {
        errno = EPROTO;
        fail(session, "version of the wire");
        return true;
    }
    if (machine_is_ours) {
        add_entropy(seed, seed_size);
        set_clock(realtime_ns);
        renew_identity(machine_id, boot_id);
        name_host(hostname);
    }
    if (ends_programs) {
        if ((errno = freezer_kill())) {
            fail(session, "killing the programs of the original");
            return true;
        }
        workload_drop();
    } else {
        freezer_thaw();
    }
    phase = RUNNING;
    session_send(session, READY, 0, NULL, 0);
    return true;
}

static bool lifeline_frame(struct session *session, enum frame_type type, uint8_t stream,
                           struct reader *payload) {
    (void)stream;
    if (type == SETUP && phase == BOOTED) return set_up(session, payload);
    if (type == RESTORE && phase == COPIED) return restore(session, payload);
    return false;
}

static void greet(uint32_t kind);

static void lifeline_gone(struct session *session) {
    /* Wait for the host, which reads why set-up failed, and then ends the machine. */
    if (session->finishing) return;
    if (phase != RUNNING) {
        say("the host does not answer");
        power_off();
    }
    phase = COPIED;
    greet(KIND_RESTORE);
}

static const struct action lifeline = {
    .frame = lifeline_frame,
    .gone = lifeline_gone,
};

static void greet(uint32_t kind) {
    uint8_t payload[128];
    struct utsname name;
    uname(&name);
    struct conn *conn = lifeline_carrier->dial(LIFELINE_PORT);
    if (!conn) {
        say("the host: %s", strerror(errno));
        power_off();
    }
    session_open(conn, &lifeline);
    struct writer writer = {payload};
    write_u32(&writer, WIRE_VERSION);
    write_u32(&writer, kind);
    write_string(&writer, name.release);
    session_send(conn->owner, HELLO, 0, payload, (size_t)(writer.at - payload));
}

void lifeline_open(const struct carrier *carrier) {
    lifeline_carrier = carrier;
    greet(KIND_BOOT);
}
