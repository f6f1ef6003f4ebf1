/* Make the pipes, or the terminal, of a program's standard streams. */
#pragma once

#include <sys/types.h>

#include "programs/request.h"

struct ends {
    int agent[3];   /* stdin to write, stdout and stderr to read, non-blocking; -1: none */
    int program[3]; /* the other ends; all -1 for a terminal, see terminal_slave */
};

/* Open what a request asks for. 0, or -1 with errno and nothing open. */
int open_ends(const struct request *request, uid_t owner, struct ends *ends);

/* Open the terminal's other side once more, and give it to the user. -1 with errno. */
int terminal_slave(int master, uid_t owner);

void terminal_resize(int master, uint16_t columns, uint16_t rows);

void close_all(int fds[3]);
