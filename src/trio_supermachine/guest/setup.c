#include "setup.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "image.h"
#include "mount.h"
#include "power.h"
#include "session.h"
#include "workload.h"

#define MIN_SEED 32u
#define MAX_SEED 512u

struct image image = {.environment = (const char *const[]){NULL}, .workdir = "/", .user = ""};
int stop_signal = SIGTERM;

static const struct carrier *lifeline_carrier;

struct setup {
    uint32_t version, layers;
    uint64_t realtime_ns;
    const char *hostname, *workdir, *user;
    const uint8_t *seed;
    uint32_t seed_size;
    const char **environment, **workload;
    int stop_signal;
};

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
    return read_whole(payload) && setup->seed_size >= MIN_SEED && setup->seed_size <= MAX_SEED;
}

void set_clock(uint64_t realtime_ns) {
    struct timespec time = {
        .tv_sec = (time_t)(realtime_ns / NS_PER_S),
        .tv_nsec = (long)(realtime_ns % NS_PER_S),
    };
    if (clock_settime(CLOCK_REALTIME, &time)) say("clock: %s", strerror(errno));
}

static void add_entropy(const uint8_t *seed, uint32_t size) {
    struct rand_pool_info *pool = must_alloc(sizeof *pool + size);
    pool->entropy_count = (int)size * 8;
    pool->buf_size = (int)size;
    memcpy(pool->buf, seed, size);
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, pool)) say("entropy: %s", strerror(errno));
    free(pool);
    if (fd >= 0) close(fd);
}

static void name_host(const char *hostname) {
    char text[512];
    struct stat status;
    if (!*hostname) return;
    if (sethostname(hostname, strlen(hostname))) say("hostname: %s", strerror(errno));
    mkdir("/etc", 0755);
    snprintf(text, sizeof text, "%.64s\n", hostname);
    if (write_text("/etc/hostname", text)) say("/etc/hostname: %s", strerror(errno));
    if (!stat("/etc/hosts", &status) && status.st_size) return;
    snprintf(text, sizeof text,
             "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t%.64s\n",
             hostname);
    if (write_text("/etc/hosts", text)) say("/etc/hosts: %s", strerror(errno));
}

/* NULL, or what failed, with errno. */
static const char *set_up_machine(const struct setup *setup) {
    add_entropy(setup->seed, setup->seed_size);
    set_clock(setup->realtime_ns);
    const char *failed = mount_root(setup->layers);
    if (failed) return failed;
    name_host(setup->hostname);
    return NULL;
}

static bool lifeline_frame(struct session *session, enum frame_type type, uint8_t stream,
                           struct reader *payload) {
    static struct setup setup; /* what it points to stays: the image refers to it */
    (void)stream;
    if (type != SETUP || setup.environment) return false;
    if (!setup_read(&setup, payload)) return false;
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
        session_fail(session, errno, 0, "%.300s: %s", failed, strerror(errno));
        return true;
    }
    if (setup.stop_signal > 0) stop_signal = setup.stop_signal;
    lifeline_carrier->listen(AGENT_PORT);
    workload_start((const char *const *)setup.workload,
                   machine_is_ours ? "/run/supermachine-workload.pid" : NULL);
    session_send(session, READY, 0, NULL, 0);
    return true;
}

static bool lifeline_data(struct session *session, uint8_t stream, const uint8_t *bytes, size_t size) {
    (void)session, (void)stream, (void)bytes, (void)size;
    return false;
}

static void lifeline_gone(struct session *session) {
    /* After a failure the host still has to read why; it then ends the machine. */
    if (!session->finishing) power_off();
}

static const struct action lifeline = {
    .frame = lifeline_frame,
    .data = lifeline_data,
    .gone = lifeline_gone,
};

void lifeline_open(const struct carrier *carrier) {
    static struct session *session;
    uint8_t payload[128];
    struct utsname name;
    uname(&name);
    lifeline_carrier = carrier;
    struct conn *conn = carrier->dial(LIFELINE_PORT);
    session_open(conn, &lifeline);
    session = conn->owner;
    struct writer writer = {payload};
    write_u32(&writer, WIRE_VERSION);
    write_u32(&writer, 0);
    write_string(&writer, name.release);
    session_send(session, HELLO, 0, payload, (size_t)(writer.at - payload));
}
