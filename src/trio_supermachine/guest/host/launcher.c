/* The launcher: a helper of the QEMU engine on the host.
 *
 * launcher run PARENT_PID PROGRAM ARGS...     become PROGRAM, killed when PARENT_PID's thread ends
 * launcher run-lean PARENT_PID PROGRAM ...    the same, without huge pages
 * launcher tsc-khz                            print the frequency of the time stamp counter */

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static int run(char **arguments, int lean) {
    long parent = strtol(arguments[0], NULL, 10);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL)) {
        perror("launcher: prctl");
        return 1;
    }
    /* Look again: it may have died before the kernel was told to watch it. */
    if (getppid() != parent) return 1;
    if (lean) prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execv(arguments[1], arguments + 1);
    fprintf(stderr, "launcher: %s: %s\n", arguments[1], strerror(errno));
    return errno == ENOENT ? 127 : 126;
}

#ifdef __x86_64__
#include <x86intrin.h>

#define WINDOW_NS 20000000

static int64_t raw_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_RAW, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Read both clocks at one moment: of several readings the one that took least. */
static void read_both(int64_t *ns, uint64_t *ticks) {
    uint64_t least = UINT64_MAX;
    for (int i = 0; i < 8; i++) {
        uint64_t before = __rdtsc();
        int64_t at = raw_ns();
        uint64_t after = __rdtsc();
        if (after - before >= least) continue;
        least = after - before;
        *ns = at;
        *ticks = before + (after - before) / 2;
    }
}

static int print_tsc_khz(void) {
    int64_t start_ns, end_ns;
    uint64_t start, end;
    read_both(&start_ns, &start);
    struct timespec window = {.tv_nsec = WINDOW_NS};
    nanosleep(&window, NULL);
    read_both(&end_ns, &end);
    printf("%.0f\n", (double)(end - start) * 1e6 / (double)(end_ns - start_ns));
    return 0;
}
#else
static int print_tsc_khz(void) {
    fprintf(stderr, "launcher: this processor has no time stamp counter\n");
    return 1;
}
#endif

int main(int count, char **arguments) {
    if (count >= 4 && !strcmp(arguments[1], "run")) return run(arguments + 2, 0);
    if (count >= 4 && !strcmp(arguments[1], "run-lean")) return run(arguments + 2, 1);
    if (count == 2 && !strcmp(arguments[1], "tsc-khz")) return print_tsc_khz();
    fprintf(stderr, "usage: launcher run|run-lean PARENT_PID PROGRAM ARGS... | tsc-khz\n");
    return 2;
}
