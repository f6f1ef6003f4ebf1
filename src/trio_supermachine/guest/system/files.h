/* The actions READ_FILE and WRITE_FILE.
 *
 * The agent reads and writes as root, wherever the host says: the host owns the guest. A program
 * may put anything at a path. So files are opened without waiting, only regular files and devices
 * are read, and a file is written as a new one that takes the place of the old by a rename. */
#pragma once

#include "core/session.h"

extern const struct action read_file_action, write_file_action;
