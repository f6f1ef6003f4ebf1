/* The serial carrier: vsock packets back to back over one port (docs/wire.rst, "Carriers").
 *
 * Theory of operation
 *
 * The agent plays the part that the kernel's vsock transport has on AF_VSOCK. Three files share the
 * work: serial.c takes packets in and acts on them, lines.c has the table of lines and what each
 * has received, sending.c gathers packets and writes them.
 *
 * A line is DIALING (REQUEST sent, RESPONSE due) or OPEN at first. When its user finishes it, it is
 * CLOSING until the host's RST has come. When the host closes an OPEN line in order and its user
 * still has bytes to use, it is LEFT: the host has forgotten it, packets find it no more, and it
 * stays until its user has used all. What is to be said on a line is a set of bits that it *owes*;
 * a line that owes something queues like one that has data to send, so that nothing needs memory
 * while the port takes nothing. A line that owes RST is dead: all but the host's RST is ignored.
 *
 * Credit: `window` bounds what the host may have sent and the user has not used; the inbox holds
 * that, and take_data resets a line that goes beyond. `peer_window` and `peer_consumed` bound what
 * may be sent. Credit is told with every packet, and by one of its own when half of the window has
 * been used.
 *
 * Silence (`voice` in sending.h): TALKING -> ENDING at FREEZE -> QUIET when FROZEN is written ->
 * TALKING at THAW or RESET. The packet that was begun before FREEZE is finished, so that a capture
 * cuts none. RESET is said to a copy: it throws away what was to be sent, and all lines, whose
 * users hear that they have gone.
 *
 * Bounds: MAX_LINES lines, beyond which the host's REQUEST is answered by RST (those that the agent
 * dials are bounded by who dials); per line its window; one buffer to receive and one to send;
 * MAX_RESETS answers to packets for lines that do not exist. When that many are owed, nothing more
 * is taken in until some are out.
 *
 * A hostile host can end this machine, which is its right: a packet that breaks the protocol ends
 * the carrier, and with it the agent. It cannot make the agent write outside of its buffers or take
 * more memory than the bounds allow. Programs in the guest cannot reach the carrier: the kernel
 * lets a virtio port be open once, and the agent has it open. */
#pragma once

#include "core/conn.h"

/* Serve this descriptor. `end` is called, with the reason, when the other side breaks the protocol,
 * or with NULL when it has gone for good. `hangs_up`: an empty reading means that it has gone. */
const struct carrier *serial_carrier(int fd, bool hangs_up, void (*end)(const char *reason));
