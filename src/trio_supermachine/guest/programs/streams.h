/* A program's standard streams: the agent's ends of its pipes or of its terminal. */
#pragma once

#include "core/loop.h"
#include "core/session.h"

/* What the host may send ahead of a program that does not read its stdin. */
#define STDIN_WINDOW 262144u

struct output {
    struct watch watch; /* fd -1: closed, or never there */
    struct session *session;
    uint8_t stream;
    uint64_t credit;
    bool readable, hung_up, enlarged;
    bool drained;              /* nobody writes it, and it is empty */
    bool terminal, last_stage; /* a terminal without a session reads as an error until the last */
};

void output_open(struct output *output, struct session *session, uint8_t stream, int fd);

enum produced { PRODUCED_NOTHING, PRODUCED_DATA, PRODUCED_END };

/* Move what there is, as far as the windows go. At the end of file END is sent and it is closed. */
enum produced output_produce(struct output *output);

struct input {
    struct watch watch; /* fd -1: closed, or never there */
    struct session *session;
    uint32_t credit, owed; /* the host's; and what it may have back */
    uint8_t *buffer;
    size_t at, size;
    uint8_t last;
    bool writable, ending, terminal, enlarged;
};

/* Begin, with the first WINDOW. */
void input_open(struct input *input, struct session *session, int fd);

/* DATA and END of the host. False: beyond the window, or after the end. */
bool input_data(struct input *input, const uint8_t *bytes, size_t size);
bool input_end(struct input *input);

/* Give credit back if it is time. Returns whether a frame was sent. */
bool input_grant(struct input *input);

void input_close(struct input *input);
