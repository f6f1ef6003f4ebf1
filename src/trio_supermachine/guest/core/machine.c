#include "core/machine.h"

#include <string.h>

#include "core/util.h"

#define CHANNEL "supermachine.channel="

bool machine_is_ours = true;

bool channel_is(const char *wanted) {
    char line[4096];
    if (read_text("/proc/cmdline", line, sizeof line) < 0) return false;
    char *state;
    for (char *word = strtok_r(line, " \n", &state); word; word = strtok_r(NULL, " \n", &state))
        if (!strncmp(word, CHANNEL, strlen(CHANNEL)) && !strcmp(word + strlen(CHANNEL), wanted))
            return true;
    return false;
}
