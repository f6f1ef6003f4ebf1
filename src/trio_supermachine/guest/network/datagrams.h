/* Datagrams of programs to the outside, and the answers.
 *
 * A *flow* is a pair of a program's address and a flow address (egress.h). It begins with the first
 * datagram, and ends with its connection to the host, after SILENCE_S without any, or to make room
 * for another: the least recently used goes, of those that the host has answered. One that the host
 * has not answered stays, so that the host owes no more than MAX_FLOWS answers, however many flows
 * a program begins; when all are such, datagrams of new flows are lost.
 *
 * States of a flow: begun when OPEN is out; answered when the host's OK has come. Datagrams of the
 * program queue from the start, MAX_QUEUED bytes at the most; what is beyond is lost, as datagrams
 * are. What the host sends goes to the program at once, from the flow address, or is lost. A frame
 * of the host that is neither that OK nor a datagram ends the flow. */
#pragma once

#include <stdbool.h>

/* Take datagrams on the flow addresses, after egress_open. False, with errno: that cannot be. */
bool datagrams_open(bool ip6);
