/* The agent: serves the host over a carrier. */
#pragma once

/* In the machine; the kernel's command line names the carrier. Does not return. */
_Noreturn void agent_run(void);

/* In tests: over this socket as if it were the serial port, or over unix sockets in a directory. */
_Noreturn void agent_run_on_fd(int fd);
_Noreturn void agent_run_on_sockets(const char *directory);
