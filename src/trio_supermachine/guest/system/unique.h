/* What two machines must not share: random numbers, the time, and names. */
#pragma once

#include "core/util.h"

/* Mix this into the kernel's random generator, and have it used from the next number on. */
void add_entropy(const uint8_t *seed, uint32_t size);

void set_clock(uint64_t realtime_ns);

/* Does nothing for an empty name. */
void name_host(const char *hostname);

/* Whether it has the form of one: 32 hexadecimal digits, or those grouped as a UUID. */
bool is_machine_id(const char *text);
bool is_boot_id(const char *text);

/* Give a freshly booted machine this identity, unless its image has one. */
void set_machine_id(const char *id);

/* Make ready, in a machine that is being captured, what its copies need for the next call. */
void prepare_renewal(void);

/* Replace what a copy has of the machine that it was made of. */
void renew_identity(const char *machine_id, const char *boot_id);
