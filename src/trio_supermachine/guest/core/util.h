/* Small things that everything uses. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire is little-endian, and so must the guest be"
#endif

#define NS_PER_MS 1000000ull
#define NS_PER_S 1000000000ull

/* One line on the console, for people. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The same, and the end of this process: for what leaves the machine without a use. */
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* CLOCK_MONOTONIC. */
uint64_t now_ns(void);

/* Memory or death: only for sizes that this program chose itself. */
void *must_alloc(size_t size);

/* dir/name, or name alone if it is absolute; "/" begins a relative dir. NULL with errno. */
char *join_path(const char *dir, const char *name);

/* Whole small files: what they were opened for happens, or -1 with errno. */
int write_text(const char *path, const char *text);
long read_text(const char *path, char *text, size_t size);

/* mkdir -p. */
int make_dirs(const char *path, unsigned mode);

/* The structure that a member is in. */
#define CONTAINER(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

static inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
