/* What makes a machine unique: random numbers, the time, and names.
 *
 * A copy of a machine begins with those of the original. RESTORE brings new ones, and they are in
 * place before any program of the copy runs (freezer.h). What they are written to is made ready at
 * the capture (prepare_renewal): in a copy all code is slow when it first runs. */
#pragma once

#include "core/util.h"

/* Mix a seed into the kernel's random generator, and have it used from the next number on. */
void add_entropy(const uint8_t *seed, uint32_t size);

/* Set CLOCK_REALTIME. */
void set_clock(uint64_t realtime_ns);

/* Set the host name, /etc/hostname and, unless it is the image's own, /etc/hosts. Does nothing for
 * an empty name. */
void name_host(const char *hostname);

/* Check the form: 32 hexadecimal digits, or those grouped as a UUID. */
bool is_machine_id(const char *text);
bool is_boot_id(const char *text);

/* Write /etc/machine-id of a freshly booted machine, unless its image has one. */
void set_machine_id(const char *id);

/* Make ready, at a capture, what copies need for renew_identity. */
void prepare_renewal(void);

/* Give a copy its own machine id and boot id. */
void renew_identity(const char *machine_id, const char *boot_id);
