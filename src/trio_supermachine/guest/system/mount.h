/* The file systems of the guest. */
#pragma once

#include "core/util.h"

/* What the initramfs needs before anything else works. */
void mount_early(void);

/* Mount the layers /dev/vda onwards, the lowest first, under an overlay, make that the root of
 * this process and what it starts, and mount the kernel's file systems there.
 * NULL, or what failed, with errno. */
const char *mount_root(unsigned layers);
