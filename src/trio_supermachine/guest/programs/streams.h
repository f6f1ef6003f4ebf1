/* The streams of an exec: the agent's ends of its program's pipes, or of its terminal.
 *
 * Both directions have a window, counted in bytes, beside the connection's own credit: a program
 * that does not read its stdin stops the host's sender, and not the other frames of the session; a
 * host that reads only one of stdout and stderr does not stop the other. */
#pragma once

#include "core/loop.h"
#include "core/session.h"

/* What the host may send ahead of a program that does not read its stdin. */
#define STDIN_WINDOW 262144u

/* From the program to the host. */
struct output {
    struct watch watch; /* fd -1: closed, or never there */
    struct session *session;
    uint8_t stream;
    uint64_t credit;
    bool readable, hung_up;
    bool enlarged; /* the pipe is a large one by now */
    bool drained;  /* nobody writes it, and it is empty */
    bool terminal;
    bool last_stage; /* the end of a terminal counts: before that, another stage will open it */
};

void output_open(struct output *output, struct session *session, uint8_t stream, int fd);

enum produced { PRODUCED_NOTHING, PRODUCED_DATA, PRODUCED_END };

/* Send one frame of what there is, as far as the windows go. At the end of file END is sent, and
 * the output is closed. */
enum produced output_produce(struct output *output);

/* From the host to the program. */
struct input {
    struct watch watch; /* fd -1: closed, or never there */
    struct session *session;
    uint32_t credit, owed; /* what the host may send; what it may have back */
    uint8_t *buffer;       /* what the program does not take */
    size_t at, size;
    uint8_t last; /* byte that came */
    bool writable, ending, terminal, enlarged;
};

/* Begin, with the first WINDOW. */
void input_open(struct input *input, struct session *session, int fd);

/* Take DATA or END of the host. False: beyond the window, or after the end. */
bool input_data(struct input *input, const uint8_t *bytes, size_t size);
bool input_end(struct input *input);

/* Give credit back if it is time. Returns whether a frame was sent. */
bool input_grant(struct input *input);

void input_close(struct input *input);
