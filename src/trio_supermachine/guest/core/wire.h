/* Frames and payloads, as docs/wire.rst has them: constants, a reader and a writer.
 *
 * The reader takes what a hostile host may have sent, and never reads beyond the payload. The first
 * thing that does not fit sets `bad`, which is tested once, at the end (read_whole). */
#pragma once

#include "core/util.h"

#define WIRE_VERSION 4
#define AGENT_PORT 1028
#define LIFELINE_PORT 1029
#define EGRESS_PORT 1030

#define FRAME_HEADER 8
#define MAX_DATA 65536u
#define MAX_FRAME (2u << 20)
#define MAX_LIST 65536u
#define MAX_DATAGRAM 65507u

enum frame_type {
    HELLO = 1,
    SETUP = 2,
    READY = 3,
    ERROR = 4,
    OK = 5,
    RESTORE = 6,
    EXEC = 8,
    STARTED = 9,
    DATA = 10,
    END = 11,
    WINDOW = 12,
    CLOSE = 13,
    SIGNAL = 14,
    ACK = 15,
    RESIZE = 16,
    EXIT = 17,
    READ_FILE = 24,
    WRITE_FILE = 25,
    PING = 32,
    SHUTDOWN = 33,
    WORKLOAD_START = 41,
    WORKLOAD_SIGNAL = 34,
    WORKLOAD_WAIT = 35,
    SET_CLOCK = 36,
    FREEZE = 37,
    THAW = 38,
    AWAIT_LISTENER = 39,
    CONNECT = 40,
    OPEN_OUTSIDE = 48,
};

#define ALL_IS_WRITTEN 1 /* the value of OK that answers SHUTDOWN */

/* A payload being read. What does not fit sets `bad`, and reads as zeros from then on. */
struct reader {
    uint8_t *at;
    size_t left;
    bool bad;
};

uint16_t read_u16(struct reader *reader);
uint32_t read_u32(struct reader *reader);
uint64_t read_u64(struct reader *reader);

/* Read bytes, in place. */
const uint8_t *read_bytes(struct reader *reader, uint32_t *size);

/* Read a string, in place: it is moved onto its length, so that there is room for its NUL. */
const char *read_string(struct reader *reader);

/* Read strings, in place, into an array from malloc that ends with NULL. */
const char **read_list(struct reader *reader, uint32_t *count);

/* Say whether the payload was sound and is used up. */
bool read_whole(const struct reader *reader);

/* A payload being written, into a buffer known to be large enough. */
struct writer {
    uint8_t *at;
};

void write_header(uint8_t *at, uint32_t length, enum frame_type type, uint8_t stream);
void write_u32(struct writer *writer, uint32_t value);
void write_u64(struct writer *writer, uint64_t value);
void write_string(struct writer *writer, const char *text);
