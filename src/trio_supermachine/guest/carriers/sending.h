/* What the serial carrier sends: packets gathered in a buffer that is one write. */
#pragma once

#include "carriers/lines.h"
#include "carriers/packet.h"

/* Between FREEZE and THAW or RESET nothing is sent, but for FROZEN as the last packet. */
enum voice { TALKING, ENDING, QUIET };
extern enum voice voice;

/* Send to this descriptor, which takes something now; `broken` hears why it does not any more. */
void sending_open(int fd, void (*broken)(const char *reason));

/* It takes more. */
void sending_may_go_on(void);
bool sending_is_possible(void);

/* An answer to a packet for no connection. As long as too many are owed nothing is to be taken in.
 */
void sending_owe_reset(uint32_t local_port, uint32_t peer_port);
bool sending_owes_too_many(void);

/* What is in the buffer is not sent, nor is any answer that was owed. */
void sending_forget(void);

/* For struct carrier. */
size_t sending_reserve(struct conn *conn, uint8_t **at);
void sending_commit(struct conn *conn, size_t size);
bool sending_turn(struct conn *conn);
bool sending_can(void);
void sending_flush(void);
