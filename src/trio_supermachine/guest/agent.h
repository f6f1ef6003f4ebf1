/* The agent: it serves the host over a carrier. */
#pragma once

/* Serve in the machine, over the carrier that the kernel's command line names. */
_Noreturn void agent_run(void);

/* Serve in tests: over a socket in the place of the serial port, or over unix sockets in a
 * directory. */
_Noreturn void agent_run_on_fd(int fd);
_Noreturn void agent_run_on_sockets(const char *directory);
