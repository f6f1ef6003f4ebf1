/* The actions READ_FILE and WRITE_FILE. */
#pragma once

#include "core/session.h"

extern const struct action read_file_action, write_file_action;
