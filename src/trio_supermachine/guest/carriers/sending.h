/* The sending half of the serial carrier: packets are gathered in one buffer, which is one write.
 *
 * The buffer is as large as what Linux's virtio-console driver takes at once. A packet is put into
 * it whole or not at all. When a write takes only a part, the rest of the buffer goes out before
 * anything else is put in. */
#pragma once

#include "carriers/lines.h"
#include "carriers/packet.h"

/* Whether packets may go out. Between FREEZE and THAW or RESET none may, but FROZEN as the last. */
enum voice {
    TALKING,
    ENDING, /* FROZEN is still to be written */
    QUIET,
};
extern enum voice voice;

/* Send to this descriptor. `broken` hears the reason when it takes nothing ever more. */
void sending_open(int fd, void (*broken)(const char *reason));

/* Hear that the descriptor takes more. */
void sending_may_go_on(void);
bool sending_is_possible(void);

/* Owe RST for a packet that concerns no line. When too many are owed, nothing is to be taken in. */
void sending_owe_reset(uint32_t local_port, uint32_t peer_port);
bool sending_owes_too_many(void);

/* Throw away what is in the buffer, and all resets that are owed. */
void sending_forget(void);

/* Functions of struct carrier. */
size_t sending_reserve(struct conn *conn, uint8_t **at);
void sending_commit(struct conn *conn, size_t size);
bool sending_turn(struct conn *conn);
bool sending_can(void);
void sending_flush(void);
