/* Packets of the serial carrier, as docs/wire.rst has them. */
#pragma once

#include <stdint.h>

#define HOST_CID 2
#define GUEST_CID 3
#define STREAM_TYPE 1
#define MAX_PAYLOAD 65536u /* of a packet that comes */

/* Operations of vsock. */
enum op { REQUEST = 1, RESPONSE, RST, SHUT, RW, CREDIT_UPDATE, CREDIT_REQUEST };

/* Operations around a capture of the machine. They are not of vsock, and concern no line. */
enum quiet_op { OP_FREEZE = 16, OP_FROZEN, OP_THAW, OP_RESET };

struct packet {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port, len;
    uint16_t type, op;
    uint32_t flags, buf_alloc, fwd_cnt;
} __attribute__((packed));
_Static_assert(sizeof(struct packet) == 44, "virtio_vsock_hdr");
