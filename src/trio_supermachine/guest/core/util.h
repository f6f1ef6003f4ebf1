/* Helpers that everything uses. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire is little-endian, and so must the guest be"
#endif

#define NS_PER_MS 1000000ull
#define NS_PER_S 1000000000ull

/* Write one line on the console, for people. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Write a line and end this process, and by that the machine: for what cannot be gone on from. */
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Read CLOCK_MONOTONIC. */
uint64_t now_ns(void);

/* Allocate zeroed memory, or die: only for sizes that this program bounds itself. */
void *must_alloc(size_t size);

/* Make dir/name, or name alone if that is absolute, in memory from malloc. A relative dir begins at
 * "/". NULL with errno. */
char *join_path(const char *dir, const char *name);

/* Write, or read with a NUL behind it, a whole small file. -1 with errno. */
int write_text(const char *path, const char *text);
long read_text(const char *path, char *text, size_t size);

/* Make a directory and those above it, as mkdir -p does. 0, or -1 with errno. */
int make_dirs(const char *path, unsigned mode);

/* Find the structure that a member is in. */
#define CONTAINER(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

static inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
