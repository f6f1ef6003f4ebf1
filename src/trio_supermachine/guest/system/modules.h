/* Kernel modules. */
#pragma once

/* Load the modules of the initramfs, in the order of /modules/order, and remove their files. A
 * kernel with everything built in has none. */
void load_modules(void);
