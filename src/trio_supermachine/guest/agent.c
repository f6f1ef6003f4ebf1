#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "carriers/serial.h"
#include "carriers/sockets.h"
#include "core/loop.h"
#include "core/machine.h"
#include "core/session.h"
#include "life/control.h"
#include "life/lifeline.h"
#include "life/power.h"
#include "network/connect.h"
#include "programs/exec.h"
#include "programs/program.h"
#include "system/files.h"
#include "system/uevent.h"

#define PORT_NAME "org.trio-supermachine.vsock"
#define PORT_WAIT_MS 10000u

static const struct action *action_of(enum frame_type type) {
    switch (type) {
    case EXEC: return &exec_action;
    case READ_FILE: return &read_file_action;
    case WRITE_FILE: return &write_file_action;
    case CONNECT: return &connect_action;
    case PING:
    case SHUTDOWN:
    case WORKLOAD_START:
    case WORKLOAD_SIGNAL:
    case WORKLOAD_WAIT:
    case SET_CLOCK:
    case FREEZE:
    case THAW:
    case AWAIT_LISTENER: return &control_action;
    default: return NULL;
    }
}

_Noreturn static void serve(const struct carrier *carrier) {
    bool work = true; /* HELLO is to be sent */
    lifeline_open(carrier);
    for (;;) {
        loop_turn(work);
        bool more_to_take = carrier->take();
        work = conn_run_queue(carrier) || more_to_take;
    }
}

/* Do not interrupt a program that runs: one that writes much then fills its pipe before this
 * process reads, and a third more goes through. An idle machine answers as fast as before. */
static void give_way(void) {
    struct sched_param none = {0};
    syscall(SYS_sched_setscheduler, 0, SCHED_BATCH | SCHED_RESET_ON_FORK, &none);
}

static void prepare(void) {
    give_way();
    spawn_init();
    loop_init();
    sessions_serve(action_of);
}

/* Find the port by its name, and write its path to `device`. */
static bool find_port(void *device) {
    DIR *ports = opendir("/sys/class/virtio-ports");
    bool found = false;
    struct dirent *entry;
    while (ports && !found && (entry = readdir(ports))) {
        char path[600], name[sizeof PORT_NAME + 1];
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        if (*entry->d_name == '.' || read_text(path, name, sizeof name) < 0) continue;
        name[strcspn(name, "\n")] = 0;
        found = !strcmp(name, PORT_NAME);
        if (found) snprintf(device, 300, "/dev/%s", entry->d_name);
    }
    if (ports) closedir(ports);
    return found;
}

static void port_ended(const char *reason) {
    say("serial port: %s", reason ? reason : "closed");
    power_off();
}

_Noreturn static void serve_port(void) {
    char device[300];
    if (!wait_for_device(find_port, device, PORT_WAIT_MS)) die("no port " PORT_NAME);
    int fd = open(device, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) die("%s: %s", device, strerror(errno));
    serve(serial_carrier(fd, false, port_ended));
}

_Noreturn void agent_run(void) {
    prepare();
    if (channel_is("vsock")) serve(socket_carrier(NULL));
    serve_port();
}

static void socket_ended(const char *reason) {
    if (reason) say("%s", reason);
    power_off();
}

static void prepare_for_test(void) {
    machine_is_ours = false;
    prepare();
}

_Noreturn void agent_run_on_fd(int fd) {
    prepare_for_test();
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    serve(serial_carrier(fd, true, socket_ended));
}

_Noreturn void agent_run_on_sockets(const char *directory) {
    prepare_for_test();
    serve(socket_carrier(directory));
}
