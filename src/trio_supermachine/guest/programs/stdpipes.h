/* Make the pipes, or the terminal, that a program's standard streams are. */
#pragma once

#include <sys/types.h>

#include "programs/request.h"

struct ends {
    int agent[3];   /* stdin to write, stdout and stderr to read, non-blocking; -1: none */
    int program[3]; /* the other ends; all -1 for a terminal: see terminal_slave */
};

/* 0, or -1 with errno and nothing open. */
int open_ends(const struct request *request, uid_t owner, struct ends *ends);

/* Another opening of the terminal's other side, made the user's own. -1 with errno. */
int terminal_slave(int master, uid_t owner);

void terminal_resize(int master, uint16_t columns, uint16_t rows);

void close_all(int fds[3]);
