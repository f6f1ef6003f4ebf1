/* File systems of the guest. */
#pragma once

#include "core/util.h"

/* Mount what the initramfs needs before anything else works. */
void mount_early(void);

/* Mount the root: the layers, /dev/vda onwards with the lowest first, under an overlay. It becomes
 * the root of this process and of all that it starts, with the kernel's file systems in place.
 * NULL, or what failed, with errno. */
const char *mount_root(unsigned layers);
