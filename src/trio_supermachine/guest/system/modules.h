#pragma once

/* Load the kernel modules that the initramfs brings, in the order of /modules/order, and remove
 * their files. Kernels with everything built in have none. */
void load_modules(void);
